"""What the layers of one denoiser call know of the step that they run in."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdiff_pl.parallel.patches.rows import Rows
from asyncdiff_pl.parallel.patches.settings import PatchSettings, Source, Statistics
from asyncdiff_pl.parallel.patches.traffic import Traffic


@dataclass(frozen=True)
class PatchStep:
    """One denoiser call in one step, for one half of the guidance batch.

    Args:
        rows: The split of the rows.
        traffic: The other patches' values.
        source: Where convolutions and attention take other patches' rows from.
        statistics: What GroupNorms normalise with.
        portion: Share of the neighbours' rows that self-attention sees where they are not of this step.
        keeps_rows: Whether other patches' rows of this step are read in the next one.
        keeps_moments: Whether their moments are.
        sends: Whether other patches read in the next step what is sent in this one.
    """

    rows: Rows
    traffic: Traffic
    source: Source
    statistics: Statistics
    portion: float
    keeps_rows: bool
    keeps_moments: bool
    sends: bool

    @property
    def keeps(self) -> bool:
        """Whether anything of this step is read in the next one."""
        return self.keeps_rows or self.keeps_moments

    @classmethod
    def of(cls, settings: PatchSettings, number: int, is_last: bool, rows: Rows, traffic: Traffic) -> PatchStep:
        """A step of a sample.

        Args:
            settings: Mode, warm-up and portion.
            number: Number of the step since its warm-up began.
            is_last: Whether the sample ends with it.
            rows: The split of the rows.
            traffic: The other patches' values.
        """
        after = Source.FRESH, Statistics.FRESH
        if settings.is_synchronous(number) and not settings.is_synchronous(number + 1) and not is_last:
            after = settings.rows_from(number + 1), settings.statistics(number + 1)
        return cls(
            rows,
            traffic,
            settings.rows_from(number),
            settings.statistics(number),
            settings.portion,
            keeps_rows=after[0] in (Source.STALE, Source.FROZEN),
            keeps_moments=after[1] in (Statistics.STALE, Statistics.CORRECTED),
            sends=settings.rows_from(number) is Source.STALE and not is_last,
        )
