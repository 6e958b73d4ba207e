"""Figures of quality: the samples of one model by setting, their means, and which setting is better than which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from quality_rows import LAYOUTS, ONE_RANK, STEP_LAYOUTS, Row, Setting
from torch import Tensor

from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference
from asyncdiff_pl.parallel.patches.settings import MODES


@dataclass
class Quality:
    """All samples of one model, by setting.

    Args:
        model: Pipeline.
        psnr_db: For each setting [samples].
        score: For each setting [samples].
    """

    model: str
    psnr_db: dict[Setting, Tensor]
    score: dict[Setting, Tensor]

    @property
    def settings(self) -> list[Setting]:
        """Settings that were measured, other than one rank, in order."""
        return sorted(self.psnr_db.keys() - {ONE_RANK}, key=order)

    @property
    def whole_settings(self) -> list[Setting]:
        """Those of them with stages or steps at a time, each of which sees whole pictures."""
        return [setting for setting in self.settings if setting.patches == 1]

    @property
    def patch_settings(self) -> list[Setting]:
        """Those of them with patches."""
        return [setting for setting in self.settings if setting.patches > 1]

    @property
    def layouts(self) -> list[Setting]:
        """Layouts in stages and steps that were measured, in order."""
        return list(dict.fromkeys(setting.layout for setting in self.whole_settings))

    @property
    def stage_layouts(self) -> list[Setting]:
        """Those of them in stages."""
        return [layout for layout in self.layouts if layout.stages > 1]

    @property
    def warm_ups(self) -> list[int]:
        """Warm-ups of stages and steps that were measured, in order."""
        return sorted({setting.warm_up for setting in self.whole_settings})

    @property
    def score_title(self) -> str:
        """What stands above a table of `score_difference`."""
        one = pm(mean_with_error(self.score[ONE_RANK]))
        return f"CLIP score (tiny-clip) less that of one rank, {one}, paired by sample:"

    def mean_psnr(self, setting: Setting) -> Mean | None:
        """PSNR in the mean; None if it was not measured."""
        return mean_with_error(self.psnr_db[setting]) if setting in self.psnr_db else None

    def score_difference(self, setting: Setting) -> Mean | None:
        """Score less that of one rank, over the same samples; None if either was not measured."""
        there = {setting, ONE_RANK} <= self.score.keys()
        return paired_difference(self.score[setting], self.score[ONE_RANK]) if there else None


def order(setting: Setting) -> tuple[float, ...]:
    """One rank, then stages and steps by layout and warm-up, then patches by number, warm-up, mode and portion."""
    if setting == ONE_RANK:
        return (0,)
    if setting.patches == 1:
        return 1, (LAYOUTS + STEP_LAYOUTS).index(setting.layout), setting.warm_up
    return 2, setting.patches, setting.warm_up, MODES.index(setting.mode), -setting.portion


class Comparison(NamedTuple):
    """Two settings on the same samples: the first should have the higher PSNR."""

    model: str
    kind: str
    better: Setting
    worse: Setting
    difference: Mean

    @property
    def holds(self) -> bool:
        """Whether it has, by more than 2 paired standard errors."""
        # an exact result has a PSNR without end
        return self.difference.value == math.inf or self.difference.in_standard_errors > 2


def gather(rows: Iterable[Row]) -> list[Quality]:
    """Rows by model and setting; where samples differ in number, the settings with fewer are left out."""
    values: dict[str, dict[Setting, dict[int, Row]]] = {}
    for row in rows:
        values.setdefault(row.model, {}).setdefault(row.setting, {})[row.sample] = row
    found = []
    for model, settings in values.items():
        samples = max(len(by_sample) for by_sample in settings.values())
        whole = {setting: by for setting, by in settings.items() if len(by) == samples}
        columns = {}
        for name in ("psnr_db", "score"):
            columns[name] = {
                setting: torch.tensor([getattr(by[index], name) for index in sorted(by)], dtype=torch.float64)
                for setting, by in whole.items()
            }
        found.append(Quality(model, columns["psnr_db"], columns["score"]))
    return found


def paired(quality: Quality, pairs: Iterable[tuple[str, Setting, Setting]]) -> list[Comparison]:
    """Comparisons of those settings that were measured.

    Args:
        quality: One model.
        pairs: Kind of the comparison, the setting that should be better, and the other.
    """
    there = quality.psnr_db
    return [
        Comparison(quality.model, kind, better, worse, paired_difference(there[better], there[worse]))
        for kind, better, worse in pairs
        if better in there and worse in there
    ]


# -- text -------------------------------------------------------------------------------------------------------------


def pm(mean: Mean | None, sign: str = "") -> str:
    """A mean with its standard error for a cell; empty for None.

    Args:
        mean: The mean.
        sign: `+` shows the sign of positive means too.
    """
    return "" if mean is None else f"{mean.value:{sign}.2f} ± {mean.standard_error:.2f}"


def outcome(what: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Lines of a list that say in how many comparisons something holds, and where it does not.

    Args:
        what: What should hold.
        comparisons: Those of its kind; none give no lines.
    """
    if not comparisons:
        return []
    holding = sum(comparison.holds for comparison in comparisons)
    return [
        f"- {what}, by more than 2 paired standard errors: in {holding} of {len(comparisons)} comparisons.",
        *(
            f"  - not so: {x.better} less {x.worse}: {x.difference.value:+.3f} ± {x.difference.standard_error:.3f} dB"
            for x in comparisons
            if not x.holds
        ),
    ]
