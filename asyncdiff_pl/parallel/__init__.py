"""The mechanism: torch.distributed and hooks on denoisers; it knows no Lightning and no pipeline class."""

from asyncdiff_pl.parallel.api import parallelize
from asyncdiff_pl.parallel.handle import Parallel
from asyncdiff_pl.parallel.layout import Groups, Layout
from asyncdiff_pl.parallel.time.settings import TimeParallel
from asyncdiff_pl.parallel.time.solved import Solved
from asyncdiff_pl.parallel.warm_up import WarmUp

__all__ = ["Groups", "Layout", "Parallel", "Solved", "TimeParallel", "WarmUp", "parallelize"]
