"""Quality against asynchrony, sample by sample: settings, and rows in CSV files."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shards import complete_keys, whole_lines, write_table

WARM_UPS = (1, 3, 5, 9)
"""Warm-ups that are measured where none are named."""
SVD_WARM_UPS = (3, 9, 17)
"""Those of the video pipeline, whose noise schedule makes little of the first nine steps (docs/quality.md)."""
COLUMNS = (
    *("model", "steps", "seed", "dtype"),
    *("stages", "stride", "cfg", "warm_up", "patches", "mode", "portion", "at_once"),
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
    """A layout and its warm-up.

    Args:
        stages: Stages of the denoiser.
        stride: Steps of one round of the stages.
        cfg: Parts of the guidance batch.
        warm_up: Exact steps at the beginning; 0 where the mode has no others, or none at all.
        patches: Patches of the rows, in place of stages.
        mode: What patches see of one another; empty for others.
        portion: Share of the neighbours' rows that self-attention sees.
        at_once: Steps that are computed at a time, each by a rank, in place of stages.
    """

    stages: int
    stride: int
    cfg: int
    warm_up: int
    patches: int = 1
    mode: str = ""
    portion: float = 1.0
    at_once: int = 1

    @property
    def layout(self) -> Setting:
        """The same without warm-up."""
        return self._replace(warm_up=0)

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return self.cfg * max(self.patches, self.at_once, self.stages + self.stride - 1)

    def __str__(self) -> str:
        if self.layout == ONE_RANK:
            return "one rank"
        if self.patches > 1:
            text = f"{self.patches} patches, {self.mode}{f', portion {self.portion:g}' if self.portion < 1 else ''}"
        elif self.at_once > 1:
            text = f"{self.at_once} steps"
        else:
            text = f"{self.stages} stages{f', stride {self.stride}' if self.stride > 1 else ''}"
        warm_up = f", warm-up {self.warm_up}" if self.warm_up else ""
        return f"{f'cfg {self.cfg} x ' if self.cfg > 1 else ''}{text}{warm_up}"


ONE_RANK = Setting(1, 1, 1, 0)
LAYOUTS = [*(Setting(*axes, 1, 0) for axes in itertools.product((2, 3, 4), (1, 2))), Setting(2, 1, 2, 0)]
"""Layouts in stages."""
STEP_LAYOUTS = [*(Setting(1, 1, 1, 0, at_once=number) for number in (2, 3, 4)), Setting(1, 1, 2, 0, at_once=2)]
"""Layouts in steps at a time."""


PATCHES = (2, 4)
"""Numbers of patches that are measured."""
PATCH_WARM_UPS = (3,)
"""Their warm-ups where none are named: one that stages and steps are measured with too."""
PORTIONS = (0.5, 0.3, 0.1, 0.0)
"""Portions that are measured, in corrected_async_gn; 1 is the mode itself."""
SEND_ROWS = ("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn")
"""Modes whose rows are those of the step before."""


def patch_settings(warm_ups: Iterable[int] = PATCH_WARM_UPS, numbers: Iterable[int] = PATCHES) -> list[Setting]:
    """Each number of patches in each mode, and corrected_async_gn with each portion, with each warm-up."""
    found = []
    for patches in numbers:
        of = partial(Setting, 1, 1, 1, patches=patches)
        # one is exact in all steps, the other in none
        found += [of(warm_up=0, mode=mode) for mode in ("full_sync", "naive")]
        for warm_up in sorted(set(warm_ups)):
            found += [of(warm_up=warm_up, mode=mode) for mode in (*SEND_ROWS, "no_sync")]
            found += [of(warm_up=warm_up, mode=SEND_ROWS[0], portion=portion) for portion in PORTIONS]
    return found


def settings_of(warm_ups: Iterable[int] = WARM_UPS, layouts: Iterable[Setting] = LAYOUTS) -> list[Setting]:
    """One rank, and each layout with each warm-up."""
    each = sorted(set(warm_ups))
    return [ONE_RANK, *(layout._replace(warm_up=warm_up) for layout in layouts for warm_up in each)]


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


# -- rows -------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """Writes rows to a CSV file, with a header if it is new."""
    cells = (
        [
            row.model,
            *row.conditions,
            *row.setting,
            row.sample,
            *(repr(round(each, 4)) for each in (row.psnr_db, row.score)),
        ]
        for row in rows
    )
    write_table(path, COLUMNS, cells, append)


def read_rows(folder: Path, conditions: Conditions | None = None, pattern: str = "samples_*of*.csv") -> list[list[Row]]:
    """Reads the rows of a folder, file by file; a line that was cut off is left out.

    Files from before there were patches, or steps at a time, have no columns of theirs.

    Args:
        folder: Where the files are.
        conditions: What the rows must have been made under; None takes that of the first row.
        pattern: Names of the files.

    Raises:
        ValueError: Rows were made under other conditions.
    """
    files = []
    for path in sorted(folder.glob(pattern)):
        header, *lines = list(csv.reader(whole_lines(path))) or [[]]
        rows = [_row(dict(zip(header, line, strict=True))) for line in lines if len(line) == len(header)]
        for row in rows:
            conditions = conditions or row.conditions
            if row.conditions != conditions:
                raise ValueError(
                    f"{path} holds rows made with {row.conditions}, not with {conditions}; take another folder."
                )
        files.append(rows)
    return files


def _row(cells: dict[str, str]) -> Row:
    """A row of a file, by its columns."""
    axes = (int(cells[name]) for name in ("stages", "stride", "cfg", "warm_up"))
    patches = int(cells.get("patches", 1)), cells.get("mode", ""), float(cells.get("portion", 1.0))
    at_once = int(cells.get("at_once", 1))
    return Row(
        cells["model"],
        Conditions(int(cells["steps"]), int(cells["seed"]), cells["dtype"]),
        Setting(*axes, *patches, at_once),
        int(cells["sample"]),
        float(cells["psnr_db"]),
        float(cells["score"]),
    )


def complete(rows: Iterable[Row], samples: int) -> set[tuple[str, Setting]]:
    """Models and settings of which all samples are there."""
    return complete_keys((((row.model, row.setting), row.sample) for row in rows), samples)
