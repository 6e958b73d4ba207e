"""Measures the forms of warm-up and refreshes on tiny-sd: quality against the number of steps that are exact.

    python scripts/measure_warm_up.py measure warm_up --shard 0/2   # 0/2 is 2 stages, 1/2 is 4, all in one folder
    python scripts/measure_warm_up.py merge warm_up

`measure` runs held-out prompts with all ranks played in one process and appends a row for each picture to
warm_up/samples_0of2.csv; started again, it goes on where it was. `merge` writes samples.csv (all rows), summary.csv,
warm_up.md and warm_up.png into the folder.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from measure_quality import Samples, prepare_pictures
from scene_samples import Scorer, load
from shards import complete_keys, parse_shard, run_commands, whole_lines, write_table
from torch import Tensor

from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference
from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.parallel import Parallel, WarmUp, parallelize
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

COLUMNS = ("steps", "seed", "stages", "form", "value", "refresh_every", "sample", "exact_steps", "psnr_db", "score")


class Setting(NamedTuple):
    """Stages, and which steps are exact.

    Args:
        stages: Stages; 1 is one rank.
        form: `count`, `noise` or `drift`.
        value: Steps, share of noise or relative change, after which warm-up ends.
        refresh_every: Each how many-th step after it is exact; 0 for none.
    """

    stages: int
    form: str
    value: float
    refresh_every: int = 0

    @property
    def warm_up(self) -> int | WarmUp:
        """The setting of the strategy."""
        if self.form == "count":
            return int(self.value)
        return WarmUp(until_noise=self.value) if self.form == "noise" else WarmUp(until_drift=self.value)

    @property
    def kind(self) -> str:
        """What it is shown as: its form, or `refresh`."""
        return "refresh" if self.refresh_every else self.form

    def __str__(self) -> str:
        text = f"warm_up {self.value:g}" if self.form == "count" else f"until_{self.form} {self.value:g}"
        return text + (f", refresh_every {self.refresh_every}" if self.refresh_every else "")


ONE_RANK = Setting(1, "count", 1)
FORMS = (
    *(("count", 3, 0), ("drift", 0.1, 0), ("count", 5, 0), ("count", 3, 10), ("noise", 0.97, 0)),
    *(("count", 9, 0), ("count", 5, 5), ("count", 1, 0), ("count", 1, 6), ("drift", 0.15, 0)),
)
"""Form, value and refresh of each setting; those with refreshes have equal numbers of exact steps without as well."""
STAGES = (2, 4)
COLOURS = {"count": "#0072B2", "noise": "#009E73", "drift": "#D55E00", "refresh": "#CC79A7"}
MARKERS = {"count": "o", "noise": "s", "drift": "D", "refresh": "^"}
LABELS = {"count": "a number", "noise": "until_noise", "drift": "until_drift", "refresh": "with refresh_every"}


class Row(NamedTuple):
    """One picture in one setting."""

    steps: int
    seed: int
    setting: Setting
    sample: int
    exact_steps: int
    psnr_db: float
    score: float


class ExactSteps(TrajectoryListener):
    """Counts the exact steps of each call of the pipeline."""

    def __init__(self) -> None:
        self.handle: Parallel | None = None
        self.calls: list[int] = []

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """A call begins."""
        self.calls.append(0)

    def on_step(self, trajectory: Trajectory, output: object) -> None:
        """A step is done."""
        assert self.handle is not None
        self.calls[-1] = self.handle.exact_steps


def measure(
    folder: Path,
    shard: str = "0/1",
    sd: str = "tiny-sd",
    clip: str = "tiny-clip",
    samples: int = 64,
    steps: int = 25,
    batch_size: int = 1,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Makes pictures of held-out prompts in every setting, and compares each with what one rank makes of its noise.

    Args:
        folder: Where the rows go; all shards share it.
        shard: `0/2` runs the first half of the settings, `1/2` the second.
        sd: Picture pipeline: an embedded one or a folder.
        clip: Model that scores: an embedded one or a folder.
        samples: Held-out prompts.
        steps: Denoising steps.
        batch_size: Pictures of one call; drift decides for all of them together.
        device: Where everything runs.
        seed: Seed of the noise, which is the same in all settings.
    """
    index, number = parse_shard(shard)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{index}of{number}.csv"
    settings = [Setting(stages, *form) for stages in STAGES for form in FORMS]
    share = -(-len(settings) // number)
    jobs = [ONE_RANK, *settings[index * share : (index + 1) * share]]
    done = complete(read_rows(path), samples)
    write_rows(path, [row for row in read_rows(path) if row.setting in done])
    scorer = Scorer(clip, device)
    pipe = load(StableDiffusionPipeline, sd, "float32", device)
    made = prepare_pictures(pipe, samples, steps, batch_size, device, seed)
    reference, _ = run(pipe, ONE_RANK, made)
    for setting in jobs:
        if setting in done:
            continue
        started = time.perf_counter()
        clips, calls = (reference, [steps] * samples) if setting == ONE_RANK else run(pipe, setting, made)
        ratios = psnr(clips, reference).tolist()
        scores = scorer.frames(clips, made[1]).mean(1).tolist()
        exact = [calls[sample // batch_size] for sample in range(samples)] if setting != ONE_RANK else calls
        each = enumerate(zip(exact, ratios, scores, strict=True))
        write_rows(path, [Row(steps, seed, setting, sample, *figures) for sample, figures in each], append=True)
        means = [sum(values) / samples for values in (exact, ratios, scores)]
        seconds = time.perf_counter() - started
        text = "exact {:.2f}, PSNR {:.2f} dB, score {:.2f}".format(*means)
        print(f"{setting.stages} stages, {setting}: {text}, {seconds:.0f} s", flush=True)


def run(pipe: DiffusionPipeline, setting: Setting, made: Samples) -> tuple[Tensor, list[int]]:
    """Makes all pictures as the ranks would, all played in this process; and the exact steps of each call."""
    trajectory, count = Trajectory(pipe.unet, lambda: pipe.scheduler), ExactSteps()
    trajectory.subscribe(count)
    count.handle = parallelize(
        pipe,
        stages=setting.stages,
        warm_up=setting.warm_up,
        refresh_every=setting.refresh_every or None,
        simulate=True,
        trajectory=trajectory,
    )
    try:
        return made[0](), count.calls
    finally:
        count.handle.remove()
        trajectory.remove()


# -- rows -------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """Writes rows to a CSV file, with a header if it is new."""
    cells = (
        [*(row.steps, row.seed, *row.setting, row.sample, row.exact_steps), *map(_rounded, (row.psnr_db, row.score))]
        for row in rows
    )
    write_table(path, COLUMNS, cells, append)


def _rounded(figure: float) -> str:
    return repr(round(figure, 4))


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file, none where there is no such file; a line that was cut off is left out."""
    if not path.exists():
        return []
    lines = [line for line in csv.reader(whole_lines(path)) if len(line) == len(COLUMNS) and line[0] != COLUMNS[0]]
    found = []
    for steps, seed, stages, form, value, refresh, sample, exact, psnr_db, score in lines:
        setting = Setting(int(stages), form, float(value), int(refresh))
        found.append(Row(int(steps), int(seed), setting, int(sample), int(exact), float(psnr_db), float(score)))
    return found


def complete(rows: Iterable[Row], samples: int) -> set[Setting]:
    """Settings of which all samples are there."""
    return complete_keys(((row.setting, row.sample) for row in rows), samples)


# -- report -----------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What a setting came to.

    Args:
        setting: The setting.
        exact: Exact steps of each sample.
        psnr_db: PSNR against one rank, in dB.
        score: CLIP score less that of one rank, paired by sample.
        gain: How many times faster the denoiser would be if stages were even and messages took no time.
    """

    setting: Setting
    exact: list[int]
    psnr_db: Mean
    score: Mean
    gain: float

    @property
    def mean_exact(self) -> float:
        """Exact steps in the mean."""
        return sum(self.exact) / len(self.exact)


def merge(folder: Path) -> None:
    """Puts the shards' rows together: tables and a plot; needs no models.

    Args:
        folder: Where the rows are, and where the report goes.
    """
    rows = {
        (row.setting, row.sample): row for part in sorted(folder.glob("samples_*of*.csv")) for row in read_rows(part)
    }
    if not rows:
        raise ValueError(f"{folder} holds no samples_*of*.csv with rows; run `measure` into it first.")
    ordered = sorted(rows.values(), key=lambda row: (row.setting, row.sample))
    write_rows(folder / "samples.csv", ordered)
    found = figures(ordered)
    write_summary(folder / "summary.csv", found)
    text = markdown(found, ordered[0].steps)
    (folder / "warm_up.md").write_text(text, encoding="utf-8")
    plot(found, folder / "warm_up.png")
    print(text)


def figures(rows: Iterable[Row]) -> list[Figures]:
    """Means of each setting that has as many samples as one rank, fewest exact steps first."""
    by_setting: dict[Setting, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, []).append(row)
    one = torch.tensor([row.score for row in by_setting.pop(ONE_RANK)], dtype=torch.float64)
    found = []
    for setting, own in by_setting.items():
        if len(own) != len(one):
            continue
        exact = [row.exact_steps for row in own]
        ratios, scores = (
            torch.tensor([getattr(row, name) for row in own], dtype=torch.float64) for name in ("psnr_db", "score")
        )
        work = sum(n + (row.steps - n) / setting.stages for n, row in zip(exact, own, strict=True))
        gain = sum(row.steps for row in own) / work
        found.append(Figures(setting, exact, mean_with_error(ratios), paired_difference(scores, one), gain))
    return sorted(found, key=lambda own: (own.setting.stages, own.mean_exact, own.setting))


def write_summary(path: Path, found: Iterable[Figures]) -> None:
    """A line for each setting: exact steps, and means with their standard errors."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["mean_exact", "min_exact", "max_exact", "ideal_gain"]
        head += [f"{name}{error}" for name in ("psnr_db", "score_difference") for error in ("", "_error")]
        writer.writerow([*COLUMNS[2:6], "samples", *head])
        for own in found:
            numbers = (own.mean_exact, min(own.exact), max(own.exact), own.gain, *own.psnr_db, *own.score)
            writer.writerow([*own.setting, len(own.exact), *(f"{number:.4f}" for number in numbers)])


def markdown(found: Iterable[Figures], steps: int) -> str:
    """A table of all settings."""
    head = [
        "stages",
        "setting",
        f"exact steps of {steps}",
        "speed-up at best",
        "PSNR, dB",
        "CLIP score less one rank's",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for own in found:
        fewest, most = min(own.exact), max(own.exact)
        exact = str(fewest) if fewest == most else f"{own.mean_exact:.1f} ({fewest} to {most})"
        cells = [str(own.setting.stages), f"`{own.setting}`", exact, f"{own.gain:.2f}"]
        cells += [f"{own.psnr_db.value:.2f} ± {own.psnr_db.standard_error:.2f}"]
        cells += [f"{own.score.value:+.2f} ± {own.score.standard_error:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plot(found: list[Figures], path: Path) -> None:
    """PSNR and score over exact steps, a column for each number of stages.

    Args:
        found: All settings.
        path: PNG to write.
    """
    import matplotlib.pyplot as plt  # measuring does not need it

    numbers = sorted({own.setting.stages for own in found})
    figure, grid = plt.subplots(
        2, len(numbers), figsize=(4.4 * len(numbers), 6.4), dpi=130, sharex=True, sharey="row", squeeze=False
    )
    for column, stages in enumerate(numbers):
        above, below = grid[:, column]
        for kind in COLOURS:
            chosen = [own for own in found if own.setting.stages == stages and own.setting.kind == kind]
            style = "-" if kind == "count" else ""
            for axes, means in ((above, [own.psnr_db for own in chosen]), (below, [own.score for own in chosen])):
                axes.errorbar(
                    [own.mean_exact for own in chosen],
                    [mean.value for mean in means],
                    yerr=[2 * mean.standard_error for mean in means],
                    linestyle=style,
                    marker=MARKERS[kind],
                    color=COLOURS[kind],
                    label=LABELS[kind],
                    elinewidth=1,
                    linewidth=1.4,
                    markersize=6,
                )
        below.axhline(0, color="0.5", linewidth=0.8, zorder=0)
        above.set_title(f"{stages} stages")
        below.set_xlabel("exact steps of a sample, warm-up and refreshes")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
    grid[0, 0].set_ylabel("PSNR against one rank, dB")
    grid[1, 0].set_ylabel("CLIP score (tiny-clip)\nless that of one rank")
    grid[0, 0].legend(frameon=False, fontsize=8, title="warm-up", title_fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.text(0.01, 0.005, "bars: 2 standard errors of the mean over samples", fontsize=7, color="0.4")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run_commands(measure, merge, description=__doc__)
