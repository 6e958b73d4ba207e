"""Lightning strategies: how the ranks share the work on a sample."""

from asyncdiff_pl.strategies.async_stages import AsyncDiffStrategy
from asyncdiff_pl.strategies.base import GroupStrategy
from asyncdiff_pl.strategies.patches import PatchStrategy
from asyncdiff_pl.strategies.step_parallel import StepParallelStrategy
from asyncdiff_pl.strategies.time_parallel import TimeParallelStrategy

__all__ = ["AsyncDiffStrategy", "GroupStrategy", "PatchStrategy", "StepParallelStrategy", "TimeParallelStrategy"]
