"""Log folders as a report reads them: what each run was, what it made so far, and which runs did the same work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from asyncdiff_pl.callbacks.sample_table import Row, key_of, merge, read_table, summarise
from asyncdiff_pl.callbacks.written_frames import samples_of, step_counts
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.report.picture_sets import PictureSet, captions_of_run

CELLS = "sweep.csv"
"""Table of a sweep's cells, in the folder that holds their log folders."""

AXES = {"stages": "stages", "stride": "stride", "patches": "patches", "parallel_steps": "steps", "ranks": "time"}
"""Columns of results.csv that tell a layout's axes, and the axes' names; cfg is another."""

WORK = ("model", "weights", "scheduler", "device", "dtype", "seed")
"""Columns of results.csv in which runs that are compared are alike."""


@dataclass
class Run:
    """One step count of one log folder.

    Args:
        folder: The log folder.
        steps: Step count.
        described: What the run was: its row of results.csv, or its settings where it has not ended.
        rows: Its samples' rows.
        config: Its settings as the command takes them; empty where they are not there.
        settings: What shaped its pictures and times, as settings.json has it.
        is_finished: Whether it came to its end.
        curve: Rows of latency.csv.
        pictures: Its pictures; without files where none were written.
    """

    folder: Path
    steps: int
    described: Row
    rows: list[Row]
    config: dict[str, Any]
    settings: dict[str, Any]
    is_finished: bool
    curve: list[Row]
    pictures: PictureSet
    label: str = field(default="", init=False)
    """What its layout is called beside those of the other runs."""

    @property
    def layout(self) -> Layout:
        """The axes that one pipeline's ranks have."""
        axes = {axis: int(float(self.described.get(column) or 1)) for column, axis in AXES.items()}
        return Layout(**axes, cfg=int(float(self.described.get("cfg") or 1)))

    @property
    def is_simulated(self) -> bool:
        """Whether one process played all ranks: its times are of no use."""
        return self.described.get("simulate") == "True"

    @property
    def devices(self) -> int:
        """Devices that worked on one sample."""
        return 1 if self.is_simulated else self.layout.pipeline_ranks

    @property
    def is_on_gpus(self) -> bool:
        """Whether it ran on GPUs."""
        return self.described.get("device") not in ("cpu", "", None)

    @property
    def is_random(self) -> bool:
        """Whether the weights mean nothing, and so the pictures."""
        return "random" in self.described.get("weights", "")

    @property
    def is_plain(self) -> bool:
        """Whether it is the pipeline as it is, on one device, not compiled: what the others are compared with."""
        is_solved = self.described.get("strategy") == "time"
        return self.layout.pipeline_ranks == 1 and not is_solved and not self.is_compiled

    @property
    def is_compiled(self) -> bool:
        """Whether torch compiled the denoiser."""
        return self.described.get("compile") not in ("none", "", None)

    @property
    def work(self) -> tuple[str, ...]:
        """What was computed, whatever the layout: runs that agree in it are compared."""
        names = sorted(name for name in self.settings if name.startswith(("module.", "data.")))
        return (
            *(f"{name} {self.described.get(name, '')}" for name in WORK),
            *(f"{name} {json.dumps(self.settings[name])}" for name in names),
        )


def expand(folders: Sequence[str]) -> list[Path]:
    """The log folders that are meant: each itself, or of a sweep's folder those of its cells, in the sweep's order.

    Raises:
        ValueError: There is no such folder, or it holds no run.
    """
    found: list[Path] = []
    for name in folders:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ValueError(f"There is no folder {name} to report; give log folders of runs, or of a sweep.")
        if (folder / CELLS).exists():
            cells = [folder / row["cell"] for row in read_table(folder / CELLS)]
            found += [cell for cell in cells if _holds_run(cell)]
        elif _holds_run(folder):
            found.append(folder)
        else:
            inner = sorted(path for path in folder.iterdir() if path.is_dir() and _holds_run(path))
            if not inner:
                raise ValueError(f"{name} holds no samples of a run; give log folders of `predict`, or of a sweep.")
            found += inner
    return list(dict.fromkeys(path.resolve() for path in found))


def read_runs(folder: Path) -> list[Run]:
    """The runs of a log folder, one for each step count; one that was stopped is read as far as it came."""
    results = {int(row["steps"]): row for row in read_table(folder / "results.csv")}
    # as the run that goes on puts them together, but nothing is written
    parts = sorted(folder.glob("samples.part*.csv"))
    rows = merge(read_table(folder / "samples.csv"), *(read_table(part) for part in parts))
    settings = json.loads((folder / "settings.json").read_text()) if (folder / "settings.json").exists() else {}
    config = yaml.safe_load((folder / "config.yaml").read_bytes()) if (folder / "config.yaml").exists() else {}
    curve = read_table(folder / "latency.csv")
    captions = captions_of_run(folder)
    with_frames = step_counts(folder)
    plain = {name: "" if value is None else str(value) for name, value in settings.items()}
    runs = []
    for steps, summary in summarise(rows).items():
        own = [row for row in rows if int(row["steps"]) == steps]
        described = results.get(steps) or {**plain, **summary}
        files = samples_of(folder, steps) if steps in with_frames else {}
        kept = {(steps, row["id"]): files[row["id"]] for row in own if row["id"] in files}
        pictures = PictureSet(folder.name, folder, kept, True, rows={key_of(row): row for row in own})
        pictures.captions = captions
        # a run that goes on with more samples has the results of the ones before until it ends
        is_finished = results.get(steps, {}).get("samples") == str(len(own)) and not parts
        times = [row for row in curve if int(row["steps"]) == steps]
        runs.append(Run(folder, steps, described, own, config, settings, is_finished, times, pictures))
    return runs


def groups_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that did the same work together, in order."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.work, []).append(run)
    # what the others are compared with comes first
    return [sorted(group, key=lambda run: (run.steps, not run.is_plain, run.devices)) for group in groups.values()]


def reference_of(run: Run, group: Sequence[Run]) -> Run | None:
    """The run that another is compared with: one device, not compiled, the same step count; the first that is."""
    return next((other for other in group if other.is_plain and other.steps == run.steps), None)


def _holds_run(folder: Path) -> bool:
    return (folder / "samples.csv").exists() or any(folder.glob("samples.part*.csv"))
