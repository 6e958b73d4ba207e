"""The table of a comparison: its lines, and how they are written to the terminal, to CSV and to Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff_pl.callbacks.sample_table import Row, cell
from asyncdiff_pl.metrics.paired import Mean

COLUMNS = ("steps", "quantity", "a", "a_error", "b", "b_error", "difference", "difference_error")
"""Columns of compare.csv."""

Value = Mean | str | None
"""A mean with its standard error (not a number where it has none), a word, or nothing."""


@dataclass
class Line:
    """One line of the table: a quantity of A, of B, and of B against A.

    Args:
        steps: Step counts that it is of, in words.
        quantity: What it is.
        first: Of A.
        second: Of B.
        difference: B less A, or of B against A.
    """

    steps: str
    quantity: str
    first: Value = None
    second: Value = None
    difference: Value = None


def as_row(line: Line) -> Row:
    """A line as a row of compare.csv."""
    row = {"steps": line.steps, "quantity": line.quantity}
    for name, value in (("a", line.first), ("b", line.second), ("difference", line.difference)):
        if isinstance(value, Mean):
            row |= {
                name: cell(value.value),
                f"{name}_error": "" if math.isnan(value.standard_error) else cell(value[1]),
            }
        else:
            row[name] = cell(value)
    return row


def texts_of(line: Line) -> tuple[str, ...]:
    """A line as it is read: means with their standard errors."""
    values = (line.first, line.second, line.difference)
    return (line.steps, line.quantity, *(_text(value) for value in values))


def _text(value: Value) -> str:
    if not isinstance(value, Mean):
        return value or ""
    return " ± ".join(filter(None, value.texts()))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the terminal; a column that is empty throughout is left out.

    Args:
        lines: Cells of each line, its header the first.
    """
    columns = [column for column in zip(*lines, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table as a Markdown page, with the sheet below.

    Args:
        header: Titles of the columns.
        lines: Cells of each line.
        notes: What else there is to say.
    """
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    rows = [f"| {' | '.join(line)} |" for line in cells]
    rows.insert(1, f"|{' --- |' * len(header)}")
    told = [f"- {note}" for note in notes]
    means = "Means over the samples in common ± standard error; differences are paired; PSNR is of those that differ."
    return "\n".join([*rows, "", means, *([""] if told else []), *told, "", "![sheet](compare.png)", ""])
