"""How a denoiser is run in patches: the settings, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args

from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.stages.settings import CompileMode

PatchMode = Literal[
    "full_sync", "corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync", "naive"
]  # fmt: skip
MODES: tuple[PatchMode, ...] = get_args(PatchMode)


class Source(Enum):
    """Where a layer takes what it needs of other patches from."""

    FRESH = "this step"
    STALE = "the step before"
    FROZEN = "the last synchronous step"
    NONE = "nowhere"


class Statistics(Enum):
    """What a GroupNorm normalises a patch with."""

    FRESH = "all rows, of this step"
    STALE = "own rows of this step, all others' of the step before"
    CORRECTED = "all rows of the step before, moved by as much as the own rows have changed"
    OWN = "own rows alone"


_SOURCES = {"full_sync": Source.FRESH, "no_sync": Source.FROZEN, "naive": Source.NONE}
_STATISTICS = {
    "full_sync": Statistics.FRESH,
    "sync_gn": Statistics.FRESH,
    "stale_gn": Statistics.STALE,
    "corrected_async_gn": Statistics.CORRECTED,
}


@dataclass(frozen=True)
class PatchSettings:
    """How a denoiser is run in patches; it validates itself.

    Args:
        layout: Patches and guidance axis.
        mode: Where layers take what they need of other patches from, after warm-up.
        warm_up: Synchronous steps at the start of each sample.
        portion: Share of the neighbours' rows that self-attention sees after warm-up; 1 is all rows of all patches.
        capture: Whether the steps are recorded as CUDA graphs and replayed; None for where there is an NVIDIA GPU.
        compile: What torch compiles: nothing, or the repeated blocks.

    Raises:
        ValueError: A setting is out of range, or two do not go together.
    """

    layout: Layout
    mode: PatchMode = "full_sync"
    warm_up: int = 4
    portion: float = 1.0
    capture: bool | None = None
    compile: CompileMode = "none"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode}; give one of {', '.join(MODES)}.")
        if self.warm_up < 1:
            raise ValueError(f"warm_up is {self.warm_up}; at least 1 synchronous step has to fill the patches' inputs.")
        if not 0 <= self.portion <= 1:
            raise ValueError(f"portion is {self.portion}; give a share of the neighbours' rows from 0 to 1.")
        if self.portion < 1 and self.mode in ("full_sync", "naive"):
            why = "computes exactly" if self.mode == "full_sync" else "sees no other rows"
            raise ValueError(
                f"mode {self.mode} {why}, and portion {self.portion} is for modes with stale rows: take portion 1, or "
                "a mode such as corrected_async_gn."
            )
        if self.compile == "full" and self.layout.patches > 1:
            raise ValueError(
                f"compile full takes a denoiser that is whole, and patches is {self.layout.patches}; take compile "
                "blocks."
            )

    def is_synchronous(self, step: int) -> bool:
        """Whether a step of a sample is computed exactly."""
        return self.mode == "full_sync" or (self.mode != "naive" and step < self.warm_up)

    def rows_from(self, step: int) -> Source:
        """Where convolutions and attention take other patches' rows from in a step."""
        return Source.FRESH if self.is_synchronous(step) else _SOURCES.get(self.mode, Source.STALE)

    def statistics(self, step: int) -> Statistics:
        """What GroupNorms normalise with in a step."""
        return Statistics.FRESH if self.is_synchronous(step) else _STATISTICS.get(self.mode, Statistics.OWN)
