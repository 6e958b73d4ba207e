"""The table of samples, one row each: written as they finish, read again by the run that goes on, and summed up."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.models.base import Prediction

Row = dict[str, str]
"""One row of a table as it is written: the columns' names and the cells' text; a missing cell is empty."""

FIRST_COLUMNS = ("steps", "id", "score", "seconds", "timed", "step_latency_ms")
LAST_COLUMNS = ("scorer",)


def cell(value: float | int | str | bool | None) -> str:
    """A value as text: numbers with six digits, None as an empty cell."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def row_of(prediction: Prediction) -> Row:
    """The row of one prediction: what it is, how long it took, and its metrics."""
    head = {"steps": prediction.steps, "id": prediction.sample.id, "seconds": prediction.seconds}
    return {k: cell(v) for k, v in (head | {"timed": prediction.timed} | prediction.metrics).items()}


def key_of(row: Row) -> tuple[int, str]:
    """What tells a row from every other: step count and id."""
    return int(row["steps"]), row["id"]


def merge(*tables: Iterable[Row]) -> list[Row]:
    """All rows, each key once, in order of step counts and then of ids, as numbers where they are numbers.

    Args:
        tables: Rows; of two with the same key the later one counts.
    """
    rows = {key_of(row): row for table in tables for row in table}

    def order(key: tuple[int, str]) -> tuple[int, bool, int, str]:
        steps, name = key
        number = int(name) if name.isdecimal() else 0
        return steps, not name.isdecimal(), number, name

    return [rows[key] for key in sorted(rows, key=order)]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of a table: the fixed ones first, then the other metrics as they appear, the scorer last."""
    fixed = {*FIRST_COLUMNS, *LAST_COLUMNS}
    others = dict.fromkeys(name for row in rows for name in row if name not in fixed)
    return [*FIRST_COLUMNS, *others, *LAST_COLUMNS]


def read_table(path: Path) -> list[Row]:
    """The rows of a table, without a last line that is not complete; none where there is no such file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def write_table(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Writes a table under its name when it is complete."""
    write_atomically(path, format_table(rows, columns).encode())


def format_table(rows: Sequence[Row], columns: Sequence[str], header: bool = True) -> str:
    """A table as CSV text."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()


class PartFile:
    """The rows of one data group, on disk as soon as they are there.

    Args:
        path: The file; it is made with the first row, in place of one that is there.
        columns: Gives the columns of some rows.
    """

    def __init__(self, path: Path, columns: Callable[[Sequence[Row]], list[str]] = columns_of) -> None:
        self.path = path
        self._columns_of = columns
        self.rows: list[Row] = []
        """The rows so far."""
        self._columns: list[str] = []
        self._file: IO[str] | None = None

    def append(self, *rows: Row) -> None:
        """Adds rows; when this returns they are on disk."""
        self.rows += rows
        if self._file is None or any(row.keys() - set(self._columns) for row in rows):
            self.close()
            self._columns = self._columns_of(self.rows)
            write_table(self.path, self.rows, self._columns)
            self._file = self.path.open("a", encoding="utf-8")
        else:
            self._file.write(format_table(rows, self._columns, header=False))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a further row opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def part_path(folder: Path, data_rank: int) -> Path:
    """Where a data group's rows are until the end of the run."""
    return folder / f"samples.part{data_rank}.csv"


def gather_parts(folder: Path, rows: Iterable[Row] = ()) -> list[Row]:
    """Puts `samples.csv`, all part files and some rows together in `samples.csv`, and removes the part files.

    When it is killed in between, nothing is lost: the parts go only after the whole has taken its name.

    Args:
        folder: Log folder of the run.
        rows: Rows that may not be on this disk.

    Returns:
        All rows, in order.
    """
    path = folder / "samples.csv"
    parts = sorted(folder.glob("samples.part*.csv"))
    merged = merge(read_table(path), *(read_table(part) for part in parts), rows)
    if merged:
        write_table(path, merged, columns_of(merged))
    for part in parts:
        part.unlink()
    return merged


def summarise(rows: Sequence[Row]) -> dict[int, Row]:
    """Averages over the samples of each step count.

    Args:
        rows: Rows of samples.

    Returns:
        For each step count, in order: steps, avg_score, std_score, avg_time, std_time, samples, timed_samples,
        avg_step_latency_ms, and avg_ and std_ of every other column of numbers. A standard deviation is that of the
        population (divided by the number of samples, numpy's default). Times, in s and ms, are over timed samples only;
        without any they are empty, as scores are without a scorer. Values that are infinite, as the PSNR of equal
        pictures is, are left out unless all are.
    """
    others = [name for name in columns_of(rows) if name not in (*FIRST_COLUMNS, *LAST_COLUMNS)]
    numbers = [name for name in others if all(_is_number(row[name]) for row in rows if row.get(name))]
    summary = {}
    for steps in sorted({int(row["steps"]) for row in rows}):
        chosen = [row for row in rows if int(row["steps"]) == steps]
        timed = [row for row in chosen if row["timed"] == "True"]
        avg_score, std_score = _moments(chosen, "score")
        avg_time, std_time = _moments(timed, "seconds")
        summary[steps] = {
            "steps": str(steps),
            "avg_score": avg_score,
            "std_score": std_score,
            "avg_time": avg_time,
            "std_time": std_time,
            "samples": str(len(chosen)),
            "timed_samples": str(len(timed)),
            "avg_step_latency_ms": _moments(timed, "step_latency_ms")[0],
        }
        for name in numbers:
            summary[steps][f"avg_{name}"], summary[steps][f"std_{name}"] = _moments(chosen, name)
    return summary


def _moments(rows: Sequence[Row], column: str) -> tuple[str, str]:
    """Mean and standard deviation of a column, empty where there is nothing to tell."""
    values = [float(row[column]) for row in rows if row.get(column)]
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return (cell(values[0]) if values else "", "")
    return cell(float(np.mean(finite))), cell(float(np.std(finite)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
