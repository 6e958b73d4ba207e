"""Solving a sample's steps together: what is measured, rows in CSV files, and tables."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from shards import complete_keys, whole_lines, write_table

STEPS = (100, 50)
ORDERS = (None, 20, 1)
MEMORIES = (1, 2, 3)
TOLERANCES = (1e-1, 1e-2, 1e-3)
GUIDANCE = {"tiny-sd": 5.0, "tiny-dit": 4.0}
"""Guidance scale of each model."""


class Setting(NamedTuple):
    """How the steps of a sample are solved together.

    Args:
        method: `triangular_anderson` (ParaTAA) or `picard` (ParaDiGMS).
        order: Over how many steps an equation reaches; None for all, and for picard.
        memory: Of how many iterates the acceleration makes a new one; 1 is none.
        tolerance: Residual up to which a state counts as converged, in the method's own measure.
        window: How many states an iteration evaluates; None for all.
        safeguard: Whether the noisiest unfinished state is left unaccelerated.
        guidance: Guidance scale; None for the model's own.
        dtype: Number format of the pipeline.
    """

    method: str
    order: int | None
    memory: int
    tolerance: float
    window: int | None = None
    safeguard: bool = True
    guidance: float | None = None
    dtype: str = "float32"

    @property
    def variation(self) -> str:
        """What is other than in the grid; empty for a setting of the grid."""
        said = []
        if self.guidance is not None:
            said.append(f"guidance {self.guidance:g}")
        if self.dtype != "float32":
            # its generators draw other noise
            said.append(f"{self.dtype}, other noise")
        if self.window is not None:
            said.append(f"window {self.window}")
        if not self.safeguard:
            said.append("no safeguard")
        return ", ".join(said)

    def __str__(self) -> str:
        if self.method == "picard":
            text = f"ParaDiGMS, tolerance {self.tolerance:g}"
        else:
            text = f"order {self.order or 'N'}, memory {self.memory}, tolerance {self.tolerance:g}"
        return f"{text}, {self.variation}" if self.variation else text


PLAIN = Setting("triangular_anderson", None, 2, 1e-2)
VARIATIONS = (
    PLAIN._replace(guidance=1.0),
    PLAIN._replace(guidance=2.0),
    PLAIN._replace(dtype="float64"),
    PLAIN._replace(safeguard=False),
    PLAIN._replace(window=25),
    PLAIN._replace(memory=5),
    PLAIN._replace(tolerance=3e-2),
    PLAIN._replace(tolerance=3e-2, memory=3),
    PLAIN._replace(guidance=1.0, tolerance=1e-3),
)
"""One thing at a time changed, to see what hinders the solver."""


class Job(NamedTuple):
    """A setting on a model, in a number of steps."""

    model: str
    steps: int
    setting: Setting

    def __str__(self) -> str:
        return f"{self.model}, {self.steps} steps, {self.setting}"


def jobs_of(models: Sequence[str], steps: Sequence[int] = STEPS) -> list[Job]:
    """All that is measured; what costs about as much stands together, and order 1, which takes longest, last."""
    by_order = [
        [Setting("triangular_anderson", order, *each) for each in itertools.product(MEMORIES, TOLERANCES)]
        for order in ORDERS
    ]
    picard = [Setting("picard", None, 2, tolerance) for tolerance in TOLERANCES]
    groups = [[*by_order[0], *VARIATIONS], by_order[1], picard, by_order[2]]
    return [Job(model, number, each) for group in groups for number in steps for model in models for each in group]


class Row(NamedTuple):
    """One sample in one setting.

    Args:
        job: Model, steps and setting.
        seed: Seed of the noise.
        sample: Number of the sample.
        iterations: Rounds of evaluations that it took part in; the exact first step comes on top of them.
        denoiser_calls: States that the denoiser was given, the first step's included; one after the other takes N.
        unfinished: States that had not converged in the end.
        psnr_db: PSNR of the picture against that of one step after the other, in dB; infinite where they are equal.
    """

    job: Job
    seed: int
    sample: int
    iterations: int
    denoiser_calls: int
    unfinished: int
    psnr_db: float


COLUMNS = ("model", "steps", *Setting._fields, *Row._fields[1:])
_READ: dict[str, Callable[[str], object]] = {
    "order": lambda cell: int(cell) if cell else None,
    "window": lambda cell: int(cell) if cell else None,
    "guidance": lambda cell: float(cell) if cell else None,
    "safeguard": lambda cell: cell == "True",
    **dict.fromkeys(("memory", "steps", "seed", "sample", "iterations", "denoiser_calls", "unfinished"), int),
    **dict.fromkeys(("tolerance", "psnr_db"), float),
}


def write_rows(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """Writes rows to a CSV file, with a header if it is new."""
    cells = ([row.job.model, row.job.steps, *row.job.setting, *row[1:-1], repr(round(row.psnr_db, 4))] for row in rows)
    write_table(path, COLUMNS, cells, append)


def read_rows(folder: Path, pattern: str = "samples_*of*.csv") -> list[Row]:
    """Reads the rows of a folder; a line that was cut off is left out."""
    rows = []
    for path in sorted(folder.glob(pattern)):
        for cells in csv.DictReader(whole_lines(path)):
            read = {name: _READ.get(name, str)(cell) for name, cell in cells.items()}
            setting = Setting(*(read[name] for name in Setting._fields))
            job = Job(read["model"], read["steps"], setting)
            rows.append(Row(job, *(read[name] for name in Row._fields[1:])))
    return rows


def complete(rows: Iterable[Row], samples: int, seed: int) -> set[Job]:
    """Jobs of which all samples are there."""
    return complete_keys(((row.job, row.sample) for row in rows if row.seed == seed), samples)


# -- tables -----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The samples of a job together."""

    iterations: float
    most: int
    calls: float
    psnr_db: float
    least_psnr_db: float
    unfinished: int
    samples: int

    def __str__(self) -> str:
        return f"{self.iterations:.1f} ({self.most}), {self.calls:.0f}, {self.psnr_db:.1f}"


def gather(rows: Iterable[Row]) -> dict[Job, Cell]:
    """The samples of each job together, in order of the jobs."""
    by_job: dict[Job, dict[int, Row]] = {}
    for row in rows:
        by_job.setdefault(row.job, {})[row.sample] = row
    found = {}
    for job, samples in by_job.items():
        iterations = [row.iterations for row in samples.values()]
        ratios = torch.tensor([row.psnr_db for row in samples.values()], dtype=torch.float64)
        calls = sum(row.denoiser_calls for row in samples.values()) / len(samples)
        mean = ratios.mean().item()
        unfinished = sum(row.unfinished for row in samples.values())
        spread = sum(iterations) / len(samples), max(iterations)
        found[job] = Cell(*spread, calls, mean, ratios.min().item(), unfinished, len(samples))
    return found


def tables(cells: dict[Job, Cell]) -> list[str]:
    """Lines of Markdown: for each model and number of steps the grid, what else was tried, and whether it pays."""
    lines = []
    for model, steps in dict.fromkeys((job.model, job.steps) for job in cells):
        here = {job.setting: cell for job, cell in cells.items() if (job.model, job.steps) == (model, steps)}
        samples = max(cell.samples for cell in here.values())
        lines += [f"### {model}, {steps} steps, {samples} samples", ""]
        lines += [
            "Iterations in the mean over samples (and most), the exact first step not counted; states that the "
            f"denoiser was given (one after the other: {steps}); PSNR in dB, mean:",
            "",
        ]
        lines += ["| | " + " | ".join(f"tolerance {tolerance:g}" for tolerance in TOLERANCES) + " |"]
        lines += ["|---" * (1 + len(TOLERANCES)) + "|"]
        kinds = [("triangular_anderson", order, memory) for order in reversed(ORDERS) for memory in MEMORIES]
        for method, order, memory in [*kinds, ("picard", None, 2)]:
            own = [here.get(Setting(method, order, memory, tolerance)) for tolerance in TOLERANCES]
            name = "ParaDiGMS" if method == "picard" else f"order {order or 'N'}, memory {memory}"
            if any(own):
                lines.append(f"| {name} | " + " | ".join("" if cell is None else str(cell) for cell in own) + " |")
        lines += ["", *_bound(steps, here)]
        varied = [setting for setting in here if setting in VARIATIONS]
        if varied:
            lines += [
                "| one thing changed | iterations, mean (most) | calls | PSNR dB, mean (least) |",
                "|---" * 4 + "|",
            ]
            for setting in [PLAIN] * (PLAIN in here) + varied:
                cell = here[setting]
                figures = f"{cell.iterations:.1f} ({cell.most}) | {cell.calls:.0f}"
                lines.append(f"| {setting} | {figures} | {cell.psnr_db:.1f} ({cell.least_psnr_db:.1f}) |")
            lines.append("")
    return lines


def _bound(steps: int, here: dict[Setting, Cell]) -> list[str]:
    """Whether rounds, the first step's counted, are at most a quarter of the steps with 30 dB in the mean."""
    grid = {setting: cell for setting, cell in here.items() if not setting.variation}
    near = {setting: cell for setting, cell in grid.items() if cell.psnr_db >= 30}
    if not near:
        return ["- No setting comes to 30 dB.", ""]
    best = min(near, key=lambda setting: (near[setting].iterations, -near[setting].psnr_db))
    cell = near[best]
    within = 1 + cell.most <= steps / 4
    return [
        f"- Fewest iterations with 30 dB or more in the mean: {best}: {cell.iterations:.1f} (most {cell.most}), "
        f"{cell.psnr_db:.1f} dB (least {cell.least_psnr_db:.1f}); with the first step {1 + cell.most} rounds, "
        f"{'at most' if within else 'more than'} a quarter of {steps} steps.",
        "",
    ]
