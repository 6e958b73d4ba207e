"""How a denoiser is run with several steps at a time: the settings and the rounds of a sample, as data.

W = warm_up, p = steps of a round, s = step. Steps s < W are exact: every rank computes them. Then come rounds of p
steps, in which rank r computes step s + r of the round that begins with s. The last round has as many steps as are
left; a round of one step is an exact step.

Source: ParaStep (arXiv 2505.14741), reuse-then-predict.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.stages.settings import CompileMode


@dataclass(frozen=True)
class StepSettings:
    """How several steps are computed at a time; it validates itself.

    Args:
        layout: Steps of a round and guidance axis.
        warm_up: Exact steps at the start of each sample.
        capture: Whether the denoiser's calls are recorded as CUDA graphs and replayed; None for where there is an
            NVIDIA GPU.
        compile: What torch compiles: nothing, the repeated blocks, or the whole denoiser.

    Raises:
        ValueError: A setting is out of range.
    """

    layout: Layout
    warm_up: int = 3
    capture: bool | None = None
    compile: CompileMode = "none"

    def __post_init__(self) -> None:
        if self.warm_up < 1:
            raise ValueError(
                f"warm_up is {self.warm_up}; at least 1 exact step has to give the estimate that ranks foresee with."
            )


@dataclass(frozen=True)
class Round:
    """Steps that are computed at a time.

    Args:
        first: The first of them, which rank 0 computes.
        size: Their number; rank r computes step `first + r`, ranks from `size` on nothing.
    """

    first: int
    size: int


def round_of(step: int, num_steps: int, steps: int, warm_up: int) -> Round | None:
    """The round that a step belongs to; None if it is exact.

    Args:
        step: Index of the step in its sample, from 0.
        num_steps: Steps of the sample.
        steps: Steps of a round.
        warm_up: Exact steps at the start.
    """
    # a pipeline that takes more steps than its scheduler announced is on its own
    if step < warm_up or step >= num_steps:
        return None
    first = step - (step - warm_up) % steps
    size = min(steps, num_steps - first)
    return Round(first, size) if size > 1 else None
