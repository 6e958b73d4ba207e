"""Which rank computes which stage for which step: AsyncDiff's schedule (arXiv 2406.06911, section 3) as data.

W = warm_up, N = stages, s = step, t_s its timestep.

- s < W: the whole denoiser, exactly. While W is not known yet, each step is exact and may be the last such one.
- stride 1: the rank of stage k computes its units at step s from inputs of other stages as they were at step s - 1;
  the output stage's result is the noise estimate of step s.
- stride 2: two steps make a round, counted from the last exact step. In its first step s the stages compute with the
  timestep of step s + 1, and the extra rank computes the output stage with t_s from inputs as they were before the
  round: its result is the estimate of step s. In the second step nobody computes: the estimate is the one that the
  output stage made in the first.
- time_shift moves the denoiser's timestep back by one step; the scheduler keeps the real one.
- refresh_every k: steps W + k - 1, W + 2k - 1, ... are exact again. Nothing is sent for them, and with stride 2 nobody
  runs ahead into them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """What one rank computes in a step.

    Args:
        stage: The stage.
        timestep: Step whose timestep the denoiser is given.
    """

    stage: int
    timestep: int


@dataclass(frozen=True)
class StepPlan:
    """What the ranks of a pipeline do in one step.

    Args:
        turns: For each rank what it computes, None for nothing; empty if every rank computes the whole denoiser.
        estimate_from: Rank whose result is the noise estimate of this step.
        is_new: Whether that result is made in this step, rather than in the one before.
        exchanges: Whether boundary tensors travel: somebody will consume them.
        fills: Whether an exact step's boundary tensors are kept: the next step may be asynchronous.
    """

    turns: tuple[Turn | None, ...] = ()
    estimate_from: int = 0
    is_new: bool = True
    exchanges: bool = False
    fills: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether this step is computed as on one rank."""
        return not self.turns


def plan_step(
    step: int,
    num_steps: int,
    *,
    stages: int,
    stride: int = 1,
    warm_up: int | None = 3,
    refresh_every: int | None = None,
    time_shift: bool = False,
    output_stage: int | None = None,
) -> StepPlan:
    """Plans one step.

    Args:
        step: Index of the step in its sample, from 0.
        num_steps: Steps of the sample.
        stages: Number of stages; 1 is always exact.
        stride: Steps of a round, 1 or 2.
        warm_up: Exact steps at the start; None while warm-up goes on and its end is not known.
        refresh_every: Each how many-th step after warm-up is exact again; None for none.
        time_shift: Whether asynchronous steps use the timestep of the step before.
        output_stage: Stage that makes the denoiser's result, the last by default.
    """
    output = stages - 1 if output_stage is None else output_stage
    # a pipeline that takes more steps than its scheduler announced is on its own: nothing was sent for them
    if stages == 1 or step >= num_steps:
        return StepPlan()
    if warm_up is None or step < warm_up:
        return StepPlan(fills=warm_up is None or step + 1 == warm_up)
    begin, end = warm_up, num_steps
    if refresh_every is not None:
        begin += (step - warm_up) // refresh_every * refresh_every
        refresh = begin + refresh_every - 1
        if step == refresh:
            return StepPlan(fills=True)
        end = min(end, refresh)
    shift = 1 if time_shift else 0
    if stride == 1:
        turns = tuple(Turn(stage, step - shift) for stage in range(stages))
        return StepPlan(turns, output, exchanges=step + 1 < end)
    if (step - begin) % 2:
        return StepPlan((None,) * (stages + 1), output, is_new=False)
    is_last = step + 1 == end
    ahead: tuple[Turn | None, ...] = tuple(None if is_last else Turn(k, step + 1 - shift) for k in range(stages))
    return StepPlan((*ahead, Turn(output, step - shift)), stages, exchanges=step + 2 < end)
