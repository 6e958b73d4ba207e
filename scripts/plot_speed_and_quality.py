"""Draws the README's first picture: seconds of full-size models on H200s against PSNR of the embedded ones.

    python scripts/plot_speed_and_quality.py docs/data/h200_denoising.csv \
        docs/data/quality_tiny_sd.csv docs/data/quality_tiny_svd.csv docs/images/speed_and_quality.png

A point is a layout that both were measured with, with as many exact steps at the start (needs matplotlib).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from quality_rows import ONE_RANK, Setting

from asyncdiff_pl.parallel.patches.settings import MODES

PAIRS = {"svd": ("SVD-XT", "tiny-svd"), "sdxl": ("SDXL", "tiny-sd")}
"""Full-size models by their name in the table of times: what they are called, and the embedded model of their kind."""

COLOURS = {1: "#555555", 2: "#0072B2", 3: "#CC79A7", 4: "#D55E00", 8: "#009E73"}
MARKERS = {1: "o", 2: "s", 3: "^", 4: "D", 8: "P"}

Table = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Point:
    """A layout.

    Args:
        label: What it is called.
        gpus: GPUs that one sample takes.
        seconds: Denoising loop of a full-size model, in s.
        psnr_db: PSNR of the embedded model against one rank, in dB; None where the layout is exact up to rounding.
        error: Its standard error, in dB.
    """

    label: str
    gpus: int
    seconds: float
    psnr_db: float | None = None
    error: float = 0.0


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def points_of(model: str, embedded: str, times: Table, quality: Table) -> list[Point]:
    """The layouts that a model was timed with and an embedded one was measured with.

    Of a row that was timed again the last one counts, and of a layout its fastest setting. One GPU stands there twice:
    with plain diffusers, at its fastest, and in its fastest setting.

    Args:
        model: The full-size model, as the table of times has it.
        embedded: The embedded one, as the table of PSNR has it.
        times: Rows of scripts/benchmark_denoising.py.
        quality: Means of scripts/measure_quality.py.
    """
    usable = [row for row in times if row["model"] == model and row["loop_s"] and not _is_other(row)]
    newest = {row["setting"]: row for row in usable}
    # diffusers' own code is the same in all runs, and how fast it is launched is not
    plain = [row for row in usable if row["is_plain"] == "1"]
    newest |= {row["setting"]: row for row in sorted(plain, key=lambda row: -float(row["loop_s"]))}
    psnr = {_setting_of_quality(row): row for row in quality if row["model"] == embedded}
    found: dict[tuple[Setting, bool], Point] = {}
    for row in newest.values():
        setting, is_plain = _setting_of_time(row), row["is_plain"] == "1"
        seconds = float(row["loop_s"])
        label = _label(setting, is_plain)
        if setting.stages == setting.at_once == 1 and setting.mode in ("", "full_sync"):
            point = Point(label, setting.ranks, seconds)
        elif mean := psnr.get(setting) or psnr.get(setting._replace(cfg=1)):
            # the guidance split is exact: halves lose what the whole batch loses
            point = Point(label, setting.ranks, seconds, float(mean["psnr_db"]), float(mean["psnr_db_error"]))
        else:
            continue
        key = setting, is_plain
        if key not in found or seconds < found[key].seconds:
            found[key] = point
    return sorted(found.values(), key=lambda point: -point.seconds)


def _is_other(row: Mapping[str, str]) -> bool:
    """Whether PSNR was not measured of what ranks compute here: layers that are split, or folded cuts."""
    return int(row.get("tensor") or 1) > 1 or "folded" in row["setting"].split(", ")


def _setting_of_time(row: Mapping[str, str]) -> Setting:
    parts = row["setting"].split(", ")
    mode = next((part for part in parts if part in MODES), "")
    portion = next((float(part.split()[1]) for part in parts if part.startswith("portion ")), 1.0)
    axes = (int(row[name]) for name in ("stages", "stride", "cfg"))
    warm_up = 0 if mode in ("full_sync", "naive") else int(row["warm_up"] or 0)
    return Setting(*axes, warm_up, int(row["patches"]), mode, portion, int(row.get("steps_at_a_time") or 1))


def _setting_of_quality(row: Mapping[str, str]) -> Setting:
    axes = (int(row[name]) for name in ("stages", "stride", "cfg", "warm_up", "patches"))
    return Setting(*axes, row["mode"], float(row["portion"]), int(row["at_once"]))


def _label(setting: Setting, is_plain: bool) -> str:
    if setting.layout == ONE_RANK:
        return "one GPU, plain diffusers" if is_plain else "one GPU, fastest"
    if setting.layout == ONE_RANK._replace(cfg=2):
        return "cfg 2"
    text = str(setting._replace(warm_up=0)).replace(" x ", " × ")
    return text.replace(", full_sync", "").replace("corrected_async_gn", "async")


# -- drawing ------------------------------------------------------------------------------------------------------


def plot(points: Mapping[str, Sequence[Point]], path: Path) -> None:
    """A panel for each model: seconds to the right, PSNR upwards, exact layouts above it.

    Args:
        points: Layouts by the panel's title.
        path: PNG to write.
    """
    figure, grid = plt.subplots(
        1, len(points), figsize=(5.4 * len(points), 4.6), dpi=150, squeeze=False, facecolor="white"
    )
    for axes, (title, chosen) in zip(grid[0], points.items(), strict=True):
        _draw(axes, chosen)
        axes.set_title(title, fontsize=12, loc="left")
    numbers = sorted({point.gpus for chosen in points.values() for point in chosen})
    handles = [
        Line2D([], [], color=COLOURS.get(n, "k"), marker=MARKERS.get(n, "X"), linestyle="", markersize=8)
        for n in numbers
    ]
    texts = [f"{number} GPU{'s' if number > 1 else ''}" for number in numbers]
    figure.legend(handles, texts, ncols=len(numbers), loc="lower center", frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def _draw(axes: Axes, points: Sequence[Point]) -> None:
    exact = [point for point in points if point.psnr_db is None]
    others = [point for point in points if point.psnr_db is not None]
    measured = [point.psnr_db or 0 for point in others]
    low, high = min([*measured, 30]) - 3, max([*measured, 38]) + 3
    # what is exact up to rounding has no place on a scale in dB: each has a line above it
    line = (high - low) / 14
    top = high + line * (len(exact) + 1)
    most = max(point.seconds for point in points)
    axes.set(xlim=(0, 1.2 * most), ylim=(low, top))
    axes.axhspan(high, top, color="#EAF3EA", zorder=0)
    for number, point in enumerate(exact):
        height = top - line * (number + 1)
        _mark(axes, point, height)
        _name(axes, point, (point.seconds, height), height, is_left=point.seconds > 0.6 * most)
    for point in others:
        _mark(axes, point, point.psnr_db or 0)
    for point, seconds, height in _spread(others, line):
        _name(axes, point, (seconds, height), point.psnr_db or 0, is_left=seconds > 0.6 * most)
    ticks = [tick for tick in range(10, 100, 5) if low <= tick <= high - line / 2]
    middle = (high + top) / 2
    axes.set_yticks([*ticks, middle], [*map(str, ticks), "exact"], fontsize=11)
    axes.tick_params(axis="x", labelsize=11)
    axes.set_xlabel("seconds on H200s, full-size model", fontsize=11)
    axes.set_ylabel("PSNR, embedded model, dB", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _mark(axes: Axes, point: Point, height: float) -> None:
    axes.errorbar(
        point.seconds,
        height,
        yerr=2 * point.error if point.error else None,
        color=COLOURS.get(point.gpus, "k"),
        marker=MARKERS.get(point.gpus, "X"),
        markersize=8,
        elinewidth=1.2,
    )


def _name(axes: Axes, point: Point, place: tuple[float, float], height: float, is_left: bool) -> None:
    """Writes a point's label beside a place, with a line to the point where that is somewhere else."""
    if place != (point.seconds, height):
        axes.plot([point.seconds, place[0]], [height, place[1]], color="0.6", linewidth=0.7, zorder=1)
    side = {"xytext": (-9, 0), "ha": "right"} if is_left else {"xytext": (9, 0), "ha": "left"}
    axes.annotate(
        point.label, place, textcoords="offset points", va="center", fontsize=11,
        color=COLOURS.get(point.gpus, "k"), **side,
    )  # fmt: skip


def _spread(points: Sequence[Point], line: float) -> list[tuple[Point, float, float]]:
    """Where labels stand: in a column behind the slowest point, a line apart."""
    placed: list[tuple[Point, float, float]] = []
    for point in sorted(points, key=lambda point: (point.psnr_db or 0, -point.seconds)):
        least = placed[-1][2] + line if placed else 0.0
        height = max(point.psnr_db or 0, least)
        placed.append((point, max(each.seconds for each in points), height))
    return placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=Path, help="CSV file with rows of scripts/benchmark_denoising.py")
    parser.add_argument("quality", type=Path, nargs="+", help="CSV files with means of scripts/measure_quality.py")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    times = read_table(options.times)
    quality = [row for path in options.quality for row in read_table(path)]
    panels = {}
    for model, (name, embedded) in PAIRS.items():
        points = points_of(model, embedded, times, quality)
        if points:
            steps = next(row["steps"] for row in times if row["model"] == model)
            panels[f"{name}, {steps} steps   |   {embedded}"] = points
            for point in points:
                psnr = "exact" if point.psnr_db is None else f"{point.psnr_db:.1f} ± {point.error:.1f} dB"
                print(f"{name:8} {point.label:24} {point.gpus} GPUs {point.seconds:7.2f} s  {psnr}")
    plot(panels, options.picture)


if __name__ == "__main__":
    main()
