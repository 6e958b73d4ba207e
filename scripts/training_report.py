"""What comparisons of trainings found: the rows of all processes, a table with means and spreads, and a plot."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards import whole_lines, write_table

COLUMNS = ("method", "seed", "minutes", "seconds", "steps", "images", "distance", "pictures", "measure", "began")
VERDICT_COLUMNS = ("method", "seed", "minutes", "sample_steps", "variance", "pictures", "distance", "measure")
THROUGHPUT_COLUMNS = (
    *("method", "batch_size", "compile", "capture", "steps", "seconds", "images_per_second", "tflops", "peak_gib"),
)


def read_rows(output: Path) -> list[dict[str, str]]:
    """All processes' rows; of a method and seed those of the run that began last, for one that was stopped does so."""
    found = _read(output, "runs*.csv")
    latest: dict[tuple[str, str], float] = {}
    for row in found:
        key = row["method"], row["seed"]
        latest[key] = max(latest.get(key, 0.0), float(row["began"]))
    return [row for row in found if float(row["began"]) == latest[row["method"], row["seed"]]]


def read_verdict(output: Path) -> list[dict[str, str]]:
    """All processes' rows of `verdict`."""
    return _read(output, "verdict*.csv")


def _read(output: Path, names: str) -> list[dict[str, str]]:
    return [row for path in sorted(output.glob(names)) for row in csv.DictReader(whole_lines(path))]


def best_methods(rows: list[dict[str, str]], number: int, without: str) -> list[str]:
    """The methods of the least mean distance at the last mark.

    Args:
        rows: As `read_rows` gives them.
        number: How many.
        without: A method that is not among them.
    """
    last = max((float(row["minutes"]) for row in rows), default=0.0)
    found: dict[str, list[float]] = {}
    for row in rows:
        if float(row["minutes"]) == last and row["method"] != without:
            found.setdefault(row["method"], []).append(float(row["distance"]))
    return sorted(found, key=lambda name: sum(found[name]) / len(found[name]))[:number]


def append_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Adds a row, and the header to a new file."""
    write_table(path, columns, [[row[name] for name in columns]], append=True)


def report(output: Path) -> None:
    """Prints a table of what has been measured, and writes OUTPUT/table.md; with matplotlib OUTPUT/distance.png too.

    Args:
        output: Folder that `measure` wrote to.
    """
    rows = read_rows(output)
    if not rows:
        raise ValueError(f"{output} holds no runs*.csv; run `measure` first.")
    found: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(float(row["minutes"]), {})[row["seed"]] = float(row["distance"])
    marks = sorted({mark for of_marks in found.values() for mark in of_marks})
    lines = [f"{rows[0]['measure']}, {rows[0]['pictures']} pictures: mean (least to most)\n"]
    lines += [f"| method | seeds | images/s | {' | '.join(f'{mark:g} min' for mark in marks)} | against uniform |"]
    lines += ["|---|---|---|" + "---|" * (len(marks) + 1)]
    for name in sorted(found, key=lambda name: _mean(found[name].get(marks[-1], {})) or float("inf")):
        speeds = [float(row["images"]) / float(row["seconds"]) for row in rows if row["method"] == name]
        cells = [_cell(found[name].get(mark, {})) for mark in marks]
        verdict = against(found[name].get(marks[-1], {}), found.get("uniform", {}).get(marks[-1], {}))
        seeds = max(len(of_mark) for of_mark in found[name].values())
        lines.append(f"| {name} | {seeds} | {sum(speeds) / len(speeds):,.0f} | {' | '.join(cells)} | {verdict} |")
    lines += _verdict_lines(read_verdict(output))
    text = "\n".join(lines)
    print(text)
    (output / "table.md").write_text(f"{text}\n", encoding="utf-8")
    # machines that train may lack it; the rows can be brought elsewhere
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(found, rows[0]["measure"], output / "distance.png")


def _verdict_lines(rows: list[dict[str, str]]) -> list[str]:
    """A table for each number of pictures and of steps: distances compare within one alone."""
    kinds: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        kind = kinds.setdefault(
            (row["pictures"], row["sample_steps"], row["variance"], row["minutes"], row["measure"]), {}
        )
        kind.setdefault(row["method"], {})[row["seed"]] = float(row["distance"])
    lines = []
    for (pictures, steps, variance, minutes, measure), found in sorted(kinds.items()):
        title = (
            f"{measure}, {pictures} pictures of ancestral sampling in {steps} steps ({variance}), after {minutes} min"
        )
        lines += ["", f"{title}: mean (least to most)\n", "| method | seeds | distance | against uniform |"]
        lines += ["|---|---|---|---|"]
        for name in sorted(found, key=lambda name: _mean(found[name]) or 0.0):
            result = against(found[name], found.get("uniform", {}))
            lines.append(f"| {name} | {len(found[name])} | {_cell(found[name])} | {result} |")
    return lines


def against(own: dict[str, float], other: dict[str, float]) -> str:
    """Whether each seed of one method, of two or more, beats each of another: a win is claimed only then."""
    if min(len(own), len(other)) < 2 or own == other:
        return ""
    if max(own.values()) < min(other.values()):
        return "each seed better"
    return "each seed worse" if min(own.values()) > max(other.values()) else "mixed"


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def _cell(values: dict[str, float]) -> str:
    spread = f" ({min(values.values()):.2f} to {max(values.values()):.2f})" if len(values) > 1 else ""
    return f"{_mean(values):.2f}{spread}" if values else ""


def _plot(found: dict[str, dict[float, dict[str, float]]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=130)
    for number, (name, marks) in enumerate(sorted(found.items())):
        places = sorted(marks)
        means = [_mean(marks[mark]) for mark in places]
        ends = [[pick(marks[mark].values()) for mark in places] for pick in (min, max)]
        (line,) = axes.plot(places, means, marker="o^sDv"[number % 5], markersize=4, linewidth=1.2, label=name)
        axes.fill_between(places, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    # beside the lines, which leave no corner free
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
