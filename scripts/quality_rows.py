"""Quality against asynchrony, sample by sample: settings, and rows in CSV files."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

WARM_UPS = (1, 3, 5, 9)
"""Warm-ups that are measured where none are named."""
COLUMNS = (
    *("model", "steps", "seed", "dtype"),
    *("stages", "stride", "cfg", "warm_up"),
    *("sample", "psnr_db", "score"),
)


class Conditions(NamedTuple):
    """What all rows of a folder have in common."""

    steps: int
    seed: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.steps} steps, seed {self.seed}, {self.dtype}"


class Setting(NamedTuple):
    """A layout and its warm-up."""

    stages: int
    stride: int
    cfg: int
    warm_up: int

    @property
    def layout(self) -> tuple[int, int, int]:
        """Stages, stride and cfg."""
        return self[:3]

    def __str__(self) -> str:
        return f"{describe(self.layout)}, warm-up {self.warm_up}"


LAYOUTS = [*itertools.product((2, 3, 4), (1, 2), (1,)), (2, 1, 2)]
"""Stages, stride and cfg of each layout."""
ONE_RANK = Setting(1, 1, 1, 0)


def settings_of(warm_ups: Iterable[int] = WARM_UPS) -> list[Setting]:
    """One rank, and each layout with each warm-up."""
    each = sorted(set(warm_ups))
    return [ONE_RANK, *(Setting(*layout, warm_up) for layout in LAYOUTS for warm_up in each)]


SETTINGS = settings_of()


class Row(NamedTuple):
    """One sample in one setting.

    Args:
        model: Pipeline.
        conditions: What all rows of a folder have in common.
        setting: Layout and warm-up.
        sample: Number of the held-out scene.
        psnr_db: PSNR against the one-rank result, in dB; infinite where they are equal.
        score: CLIP score of all frames.
    """

    model: str
    conditions: Conditions
    setting: Setting
    sample: int
    psnr_db: float
    score: float


def describe(layout: tuple[int, int, int]) -> str:
    """A layout in words."""
    stages, stride, cfg = layout
    if stages == 1:
        return "one rank"
    return f"{f'cfg {cfg} x ' if cfg > 1 else ''}{stages} stages{f', stride {stride}' if stride > 1 else ''}"


def ranks(layout: tuple[int, int, int]) -> int:
    """How many ranks a layout takes."""
    stages, stride, cfg = layout
    return cfg * (stages + stride - 1)


# -- rows -------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """Writes rows to a CSV file, with a header if it is new."""
    new = not append or not path.exists()
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            figures = (repr(round(row.psnr_db, 4)), repr(round(row.score, 4)))
            writer.writerow([row.model, *row.conditions, *row.setting, row.sample, *figures])


def read_rows(folder: Path, conditions: Conditions | None = None, pattern: str = "samples_*of*.csv") -> list[list[Row]]:
    """Reads the rows of a folder, file by file; a line that was cut off is left out.

    Args:
        folder: Where the files are.
        conditions: What the rows must have been made under; None takes that of the first row.
        pattern: Names of the files.

    Raises:
        ValueError: Rows were made under other conditions.
    """
    files = []
    for path in sorted(folder.glob(pattern)):
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        lines = [line for line in csv.reader(whole) if len(line) == len(COLUMNS) and line[0] != COLUMNS[0]]
        rows = [
            Row(
                line[0],
                Conditions(int(line[1]), int(line[2]), line[3]),
                Setting(*map(int, line[4:8])),
                int(line[8]),
                float(line[9]),
                float(line[10]),
            )
            for line in lines
        ]
        for row in rows:
            conditions = conditions or row.conditions
            if row.conditions != conditions:
                raise ValueError(
                    f"{path} holds rows made with {row.conditions}, not with {conditions}; take another folder."
                )
        files.append(rows)
    return files


def complete(rows: Iterable[Row], samples: int) -> set[tuple[str, Setting]]:
    """Models and settings of which all samples are there."""
    found: dict[tuple[str, Setting], set[int]] = {}
    for row in rows:
        found.setdefault((row.model, row.setting), set()).add(row.sample)
    return {key for key, there in found.items() if there >= set(range(samples))}
