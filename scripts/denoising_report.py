"""Table, CSV file and plot of scripts/benchmark_denoising.py.

    python scripts/denoising_report.py rows.csv --plot rows.png

prints the rows of a CSV file as Markdown and draws them; of rows that were measured again, the last ones count.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Figures of one layout in one setting by the names of `COLUMNS`; None and what is missing were not measured."""

COLUMNS = (
    *("model", "layout", "setting", "gpus", "stages", "stride", "patches", "tensor", "steps_at_a_time", "cfg"),
    *("steps", "warm_up", "compile", "capture", "balance", "warm_up_mode", "is_plain"),
    *("loop_s", "over_eager", "over_compiled", "pipeline_s", "pipeline_share_of_eager"),
    *("exact_steps", "exact_step_ms", "asynchronous_step_ms", "of_ideal", "glue_ms", "host_ms"),
    *("slowest_share", "fastest_share", "slowest_ms", "exposed_ms", "mib_per_step", "split_share"),
    *("peak_gib", "peak_of_eager", "later_peak_gib", "deviation", "timed_loops", "setup_s", "row_s"),
    *("graphs", "refusal", "cut", "failure", "machine", "torch", "diffusers", "command"),
)
"""Columns of the CSV file.

`loop_s` and `pipeline_s` are seconds of the denoising loop and of the whole pipeline, `over_...` how many times faster
the loop is than on one GPU with plain diffusers, and than with the fastest compiled one. `of_ideal` is the time of a
step after warm-up over that of one GPU in the same setting, divided by the number of GPUs: 1 is a perfect split. Of
`steps_at_a_time` steps that are computed together, each has its share of their round in the times of a step.
`glue_ms` is what a step does outside of the denoiser, `host_ms` what the CPU spends on it: where that is the whole
step, launches set the pace, or, with several steps at a time, the CPU waited for the GPU to come to the round before.
`..._share` are shares of the denoiser's measured cost that the slowest and the fastest stage have, `slowest_ms` is what
the slowest computes in a step, taken from the last step, which sends nothing, `exposed_ms` what messages add to it.
`later_peak_gib` is the peak of memory once compiling, measuring units and the first steps are over. `split_share` is
the share of the weights that is in layers that tensor parallelism splits. `deviation` is that of the latents from one
GPU's, relative; with random weights it tells rounding from staleness, not how good a picture is.
"""

SHOWN = {
    "model": "model",
    "layout": "layout",
    "GPUs": "gpus",
    "setting": "setting",
    "loop, s": "loop_s",
    "× eager": "over_eager",
    "× compiled": "over_compiled",
    "exact step, ms": "exact_step_ms",
    "asynchronous step, ms": "asynchronous_step_ms",
    "of ideal": "of_ideal",
    "slowest / fastest stage": "shares",
    "slowest stage, ms": "slowest_ms",
    "exposed, ms": "exposed_ms",
    "glue, ms": "glue_ms",
    "CPU, ms": "host_ms",
    "MiB a step": "mib_per_step",
    "weights split": "split_share",
    "peak, GiB": "peak_gib",
    "deviation": "deviation",
    "whole pipeline, s": "pipeline_s",
}
"""Columns of the Markdown table."""

COLOURS = {1: "#999999", 2: "#56B4E9", 3: "#009E73", 4: "#0072B2"}
MANY = "#D55E00"


class Table:
    """Compares rows with those of one GPU, prints them, and adds them to a CSV file one by one.

    Args:
        path: The CSV file; None for none.
        columns: Its columns.
        shown: Columns of the Markdown table: what they are called, and which of the file's they are.
        compare: Gives the figures of a row that come of those before it.

    Raises:
        ValueError: The file holds another table.
    """

    def __init__(
        self,
        path: Path | None,
        columns: Sequence[str] = COLUMNS,
        shown: Mapping[str, str] = SHOWN,
        compare: Callable[[Row, Iterable[Row]], Row] | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self._path, self._columns, self._shown = path, columns, shown
        self._compare = compare or compare_layouts
        if path is not None and path.exists():
            read_rows(path, columns)

    def add(self, row: Row) -> None:
        """Adds a row; those of one GPU come first."""
        row = row | self._compare(row, self.rows)
        # as the file has it, so that both round the same number
        row = {name: float(_cell(value)) if isinstance(value, float) else value for name, value in row.items()}
        if not self.rows:
            print(header(self._shown), flush=True)
        self.rows.append(row)
        print(line(row, self._shown), flush=True)
        if self._path is None:
            return
        is_new = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if is_new:
                writer.writeheader()
            writer.writerow({name: _cell(row.get(name)) for name in self._columns})


def compare_layouts(row: Row, others: Iterable[Row]) -> Row:
    """What a row comes to beside one GPU.

    Args:
        row: The row.
        others: Rows of the same run that were measured before it.
    """
    if row.get("loop_s") is None:
        return {}
    before = [*others, row]
    alone = [o for o in before if o["model"] == row["model"] and o["gpus"] == 1 and o.get("loop_s") is not None]
    found: Row = {}
    for plain in (other for other in alone if other["is_plain"]):
        found["over_eager"] = plain["loop_s"] / row["loop_s"]
        for name, figure in (("pipeline_s", "pipeline_share_of_eager"), ("peak_gib", "peak_of_eager")):
            if plain.get(name) is not None and row.get(name) is not None:
                found[figure] = row[name] / plain[name]
    compiled = [other["loop_s"] for other in alone if other["compile"] != "none"]
    if compiled:
        found["over_compiled"] = min(compiled) / row["loop_s"]
    for same in alone:
        if row["gpus"] > 1 and all(same[name] == row[name] for name in ("compile", "capture")):
            # the exact split of a guidance batch has no asynchronous steps
            step = row.get("asynchronous_step_ms") or row["exact_step_ms"]
            found["of_ideal"] = step / (same["exact_step_ms"] / row["gpus"])
    return found


def header(shown: Mapping[str, str] = SHOWN) -> str:
    """The first two lines of the Markdown table."""
    return f"| {' | '.join(shown)} |\n{'|---' * len(shown)}|"


def line(row: Row, shown: Mapping[str, str] = SHOWN) -> str:
    """A row of the Markdown table; the cells of one that failed say why."""
    told = dict(row)
    if row.get("slowest_share") is not None:
        told["shares"] = f"{row['slowest_share']:.1%} / {row['fastest_share']:.1%}"
    cells = [_cell(told.get(name), 4) for name in shown.values()]
    if row.get("failure"):
        return f"| {' | '.join(cells[:4])} | failed: {row['failure']} |"
    return f"| {' | '.join(cells)} |"


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Reads the rows of a CSV file; a line that was cut off is left out.

    Raises:
        ValueError: The file holds another table.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    reader = csv.reader(text for text in lines if text.endswith("\n"))
    if next(reader, None) != list(columns):
        raise ValueError(f"{path} holds another table; give another file as --csv.")
    return [
        {name: _value(cell) for name, cell in zip(columns, cells, strict=True)}
        for cells in reader
        if len(cells) == len(columns)
    ]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that were measured again later, or that failed, in order of the last measurement."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        # how many devices the machine had beside those that the layout takes does not matter
        device = (row.get("machine") or "").partition(" x ")[2]
        key = (*(row.get(name) for name in ("model", "layout", "setting", "steps")), device)
        if row.get("loop_s") is not None:
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def plot(rows: Iterable[Row], path: Path) -> None:
    """Seconds of the denoising loop, a bar each setting, a column of bars each model.

    Args:
        rows: The rows; those that failed are left out.
        path: PNG to write.
    """
    import matplotlib.pyplot as plt  # measuring does not need it

    rows = newest(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return
    most = max(sum(row["model"] == model for row in rows) for model in models)
    figure, grid = plt.subplots(
        1, len(models), figsize=(4.6 * len(models) + 0.6, 1.3 + 0.34 * most), dpi=130, squeeze=False
    )
    for axes, model in zip(grid[0], models, strict=True):
        chosen = [row for row in rows if row["model"] == model]
        seconds = [row["loop_s"] for row in chosen]
        colours = [COLOURS.get(int(row["gpus"]), MANY) for row in chosen]
        labels = [f"{row['setting']} ({row['gpus']} GPU{'s' if row['gpus'] > 1 else ''})" for row in chosen]
        bars = axes.barh(range(len(chosen)), seconds, color=colours, height=0.7)
        texts = [
            f"{s:.3g} s" + (f", {row['over_eager']:.2f}×" if row["over_eager"] else "")
            for s, row in zip(seconds, chosen, strict=True)
        ]
        axes.bar_label(bars, texts, padding=3, fontsize=7)
        axes.set_yticks(range(len(chosen)), labels, fontsize=7)
        # bars of all models are as high
        axes.set_ylim(most - 0.4, -0.6)
        axes.set(xlim=(0, 1.3 * max(seconds)), xlabel="denoising loop, s")
        axes.set_title(f"{model}, {chosen[0]['steps']} steps", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    text = f"{rows[-1]['machine']}, torch {rows[-1]['torch']}; × is against one GPU with plain diffusers, eager"
    figure.text(0.01, 0.008, text, fontsize=7, color="0.4")
    figure.savefig(path)
    plt.close(figure)


def _cell(value: Any, digits: int = 6) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+", help="CSV files that the benchmark wrote")
    parser.add_argument("--plot", type=Path, help="PNG to write; needs matplotlib")
    options = parser.parse_args()
    try:
        rows = [row for path in options.csv for row in read_rows(path)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(header())
    for row in newest(rows):
        print(line(row))
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
