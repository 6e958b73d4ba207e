"""The plots of a report: what layouts take against what they give, and curves over steps (needs matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncdiff_pl.metrics.paired import Mean
from asyncdiff_pl.report.report_table import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
WIDTH, HEIGHT = 7.2, 4.4
"""Size of a plot in inches."""


def check_matplotlib() -> None:
    """Tells early that plots cannot be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("report draws its plots with matplotlib: pip install 'asyncdiff_pl[report]'.") from error
    matplotlib.use("Agg")


def draw_plots(entries: Sequence[Entry]) -> dict[str, Figure]:
    """All plots that the lines of runs of the same work have numbers for, by name."""
    quality = {
        "pareto_score": ("score", _scorer(entries)),
        "pareto_psnr": ("psnr", "PSNR against one device, dB"),
    }
    plots = {name: _pareto(entries, *what) for name, what in quality.items()}
    if len({entry.run.steps for entry in entries}) > 1:
        plots["steps_score"] = _over_step_counts(entries, "score", _scorer(entries))
        plots["steps_seconds"] = _over_step_counts(entries, "seconds", "seconds a sample")
    plots["step_latency"] = _over_steps(entries)
    return {name: figure for name, figure in plots.items() if figure is not None}


def _scorer(entries: Sequence[Entry]) -> str:
    return next((entry.scorer for entry in entries if entry.scorer), "score")


def _pareto(entries: Sequence[Entry], name: str, title: str) -> Figure | None:
    """Seconds a sample against a measure of quality; lines join what nothing else beats in both."""
    points = []
    for entry in entries:
        value: Mean | None = getattr(entry, name)
        if value is not None and entry.seconds is not None and not entry.run.is_simulated:
            points.append((entry, entry.seconds, value))
    if not points:
        return None
    figure, axes = _new()
    several = len({entry.run.steps for entry in entries}) > 1
    colors = _colors(entries)
    labels = list(colors)
    seen = set()
    for entry, seconds, value in points:
        marker = MARKERS[labels.index(entry.run.label) % len(MARKERS)]
        label = entry.run.label if entry.run.label not in seen else None
        seen.add(entry.run.label)
        axes.errorbar(
            seconds.value,
            value.value,
            xerr=_error(seconds),
            yerr=_error(value),
            fmt=marker,
            color=colors[entry.run.label],
            label=label,
            capsize=2,
            elinewidth=0.8,
        )
        if several:
            place = (seconds.value, value.value)
            axes.annotate(f"{entry.run.steps}", place, (5, 4), textcoords="offset points", fontsize=8)
    # runs of other step counts are compared with other pictures: what PSNR says of them does not compare
    parts = {entry.run.steps for entry, *_ in points} if name == "psnr" else {None}
    for steps in sorted(parts, key=lambda part: part or 0):
        chosen = [(s.value, v.value) for entry, s, v in points if steps in (None, entry.run.steps)]
        axes.plot(*zip(*pareto_front(chosen), strict=True), color="0.6", linewidth=1, zorder=0)
    axes.set_xlabel("seconds a sample (less is better)" + (", figures at the points: steps" if several else ""))
    axes.set_ylabel(f"{title} (more is better)")
    return _finished(figure, axes)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats, in order: none is both as low in the first and as high in the second."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _over_step_counts(entries: Sequence[Entry], name: str, title: str) -> Figure | None:
    """A measure over numbers of steps, a line a layout."""
    figure, axes = _new()
    for label, color in _colors(entries).items():
        values = ((e.run.steps, getattr(e, name)) for e in entries if e.run.label == label)
        found = [(steps, mean) for steps, mean in values if mean is not None]
        if found:
            errors = [_error(mean) or 0 for _, mean in found]
            xs, ys = [steps for steps, _ in found], [mean.value for _, mean in found]
            axes.errorbar(xs, ys, yerr=errors, marker="o", label=label, color=color, capsize=2)
    axes.set_xlabel("number of steps")
    axes.set_ylabel(title)
    return _finished(figure, axes)


def _over_steps(entries: Sequence[Entry]) -> Figure | None:
    """The time of each step of a sample, a line a layout, of the largest number of steps."""
    steps = max(entry.run.steps for entry in entries)
    chosen = [e for e in entries if e.run.steps == steps and e.run.curve and not e.run.is_simulated]
    if not chosen:
        return None
    figure, axes = _new()
    colors = _colors(entries)
    for entry in chosen:
        xs = [int(row["step"]) for row in entry.run.curve]
        ys = [float(row["mean_ms"]) for row in entry.run.curve]
        axes.plot(xs, ys, marker=".", label=entry.run.label, color=colors[entry.run.label])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"step (of {steps})")
    axes.set_ylabel("ms a step")
    return _finished(figure, axes)


def _new() -> tuple[Figure, Axes]:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")


def _finished(figure: Figure, axes: Axes) -> Figure | None:
    import matplotlib.pyplot as plt

    plt.close(figure)
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return None
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _colors(entries: Sequence[Entry]) -> dict[str, str]:
    labels = list(dict.fromkeys(entry.run.label for entry in entries))
    return {label: f"C{number % 10}" for number, label in enumerate(labels)}


def _error(mean: Mean) -> float | None:
    return None if math.isnan(mean.standard_error) else mean.standard_error
