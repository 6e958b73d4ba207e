"""Draws the curves of training runs from their TensorBoard logs (needs matplotlib), and tells the final values.

    python scripts/plot_training.py lightning_logs docs/images

Each run gets a picture, docs/images/training_svd_unet.png say; the table goes to the terminal and, with `--table FILE`,
to a Markdown file.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import auto_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LINE, CLOUD = "#0072B2", "#9DC3DB"

Curves = dict[str, dict[int, float]]
"""For each tag its value at each step, in order."""


class Run(NamedTuple):
    """What a run logged.

    Args:
        curves: Its scalars.
        starts: Steps at which a training began that another had gone before.
    """

    curves: Curves
    starts: list[int]


def plot(
    logs: Path,
    pictures: Path,
    pattern: str = "train_*",
    table: Path | None = None,
    tags: list[str] | None = None,
    in_a_row: bool = False,
) -> None:
    """Draws a picture for each run of a log folder.

    Args:
        logs: Folder with a folder for each run; what a run that was continued wrote in several versions is joined.
        pictures: Where the PNG files go.
        pattern: Names of the runs.
        table: Markdown file for the final values.
        tags: What to draw, such as `[train/loss,validation/psnr]`; null draws train/loss and all of validation/.
        in_a_row: Whether a version that begins at step 0 started from the export of the one before (`start_from`), so
            that its steps count on from there; otherwise it began anew, and what went before is left out.
    """
    runs = {folder.name: read_run(folder, in_a_row) for folder in sorted(logs.glob(pattern)) if folder.is_dir()}
    runs = {name: run for name, run in runs.items() if run.curves}
    if not runs:
        raise ValueError(f"{logs} holds no runs {pattern} with TensorBoard events; give the folder that runs log to.")
    pictures.mkdir(parents=True, exist_ok=True)
    for name, (curves, starts) in runs.items():
        chosen = {tag: points for tag, points in curves.items() if (tag in tags if tags else _is_shown(tag))}
        if chosen:
            draw(name, Run(chosen, starts), pictures / f"{name.replace('train_', 'training_', 1)}.png")
    text = final_values({name: run.curves for name, run in runs.items()})
    print(text)
    if table is not None:
        table.write_text(text, encoding="utf-8")


def read_run(folder: Path, in_a_row: bool = False) -> Run:
    """The scalars of all event files below a folder.

    Where a later file begins at a step that an earlier one had reached, the earlier one's values from there on are
    dropped: they belong to steps that were done again.

    Args:
        folder: Folder of a run.
        in_a_row: Whether a file that begins as early as the first one counts on from the last step before it.
    """
    files = []
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        if scalars:
            files.append((min(points[0].wall_time for points in scalars.values()), scalars))
    joined: Curves = {}
    starts = [0]
    first = None
    for _, scalars in sorted(files, key=lambda file: file[0]):
        begin = min(point.step for points in scalars.values() for point in points)
        first = begin if first is None else first
        if in_a_row and joined and begin <= first:
            starts.append(max(step for points in joined.values() for step in points) + 1)
        begin += starts[-1]
        joined = {tag: {step: v for step, v in points.items() if step < begin} for tag, points in joined.items()}
        for tag, points in scalars.items():
            joined.setdefault(tag, {}).update({starts[-1] + point.step: point.value for point in points})
    return Run({tag: dict(sorted(points.items())) for tag, points in sorted(joined.items()) if points}, starts[1:])


def draw(name: str, run: Run, path: Path, columns: int = 4) -> None:
    """Draws one panel for each curve, with a line where a training began from what another had left.

    Args:
        name: Title.
        run: What to draw.
        path: PNG to write.
        columns: Panels of a row.
    """
    curves = run.curves
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.4 * rows + 0.3), dpi=130, squeeze=False)
    for axes, (tag, points) in zip(grid.flat, curves.items(), strict=False):
        steps, values = np.array(list(points)), np.array(list(points.values()))
        if len(values) > 40:
            axes.plot(steps, values, color=CLOUD, linewidth=0.8)
            axes.plot(*running_mean(steps, values, len(values) // 40), color=LINE, linewidth=1.4)
        else:
            axes.plot(steps, values, color=LINE, linewidth=1.4, marker="o", markersize=3)
        for start in run.starts:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        if values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
        axes.set_title(tag, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    figure.suptitle(name.removeprefix("train_"), fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over `width` neighbouring points, each at the mean of their steps."""
    window = np.ones(width) / width
    return np.convolve(steps, window, mode="valid"), np.convolve(values, window, mode="valid")


def final_values(runs: Mapping[str, Curves]) -> str:
    """The last value of each curve as a Markdown table."""
    lines = ["| run | steps | curve | final value |", "|---|---|---|---|"]
    lines += [
        f"| {name.removeprefix('train_')} | {max(points)} | {tag} | {points[max(points)]:.4g} |"
        for name, curves in runs.items()
        for tag, points in curves.items()
        if _is_shown(tag)
    ]
    return "\n".join(lines) + "\n"


def _is_shown(tag: str) -> bool:
    return tag == "train/loss" or tag.startswith("validation/")


def main() -> None:
    try:
        auto_cli(plot, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
