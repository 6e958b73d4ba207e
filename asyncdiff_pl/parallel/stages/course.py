"""Which steps of a sample are exact, and what each rank computes in each: schedule.py, and the end of a warm-up."""

from __future__ import annotations

import torch

from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.stages.call import Stream
from asyncdiff_pl.parallel.stages.schedule import StepPlan, plan_step
from asyncdiff_pl.parallel.stages.settings import Settings
from asyncdiff_pl.parallel.trajectory import Trajectory
from asyncdiff_pl.parallel.warm_up import Span, WarmUp, is_still, noise_levels, span_of


class Course:
    """Plans steps as they come.

    Args:
        trajectory: Where the pipeline stands.
        settings: Layout and warm-up.
        exchange: This rank's messages; None plays all ranks in this process.
    """

    def __init__(self, trajectory: Trajectory, settings: Settings, exchange: Exchange | None) -> None:
        self._trajectory = trajectory
        self._settings = settings
        self._exchange = exchange

    def plan(self, stream: Stream, step: int) -> StepPlan:
        """What is to be done in a step.

        Args:
            stream: The denoiser call.
            step: Which step since its warm-up began; the first says how long that may last.
        """
        settings, layout = self._settings, self._settings.layout
        if step == 0:
            stream.span = self._span()
            stream.warm_up = stream.span.length
        return plan_step(
            step,
            self._trajectory.num_steps - stream.begins,
            stages=layout.stages,
            stride=layout.stride,
            warm_up=stream.warm_up,
            refresh_every=settings.refresh_every,
            time_shift=settings.time_shift,
            output_stage=stream.program.boundary.output_stage if stream.program else None,
        )

    def compares(self, stream: Stream, plan: StepPlan, step: int) -> bool:
        """Whether an exact step measures how far boundary tensors drifted since the step before.

        Only steps of one warm-up are compared: what is there before it is another sample's.
        """
        return plan.fills and stream.warm_up is None and step > 0 and step + 1 >= stream.span.fewest

    def end_warm_up(self, stream: Stream, step: int, drift: torch.Tensor | None) -> None:
        """Decides, alike on all ranks, whether a warm-up whose end was not known is over with a step.

        Args:
            stream: The denoiser call.
            step: Which step since its warm-up began.
            drift: What was measured in it, if it was.
        """
        if stream.warm_up is not None:
            return
        settings, still = self._settings.warm_up, False
        assert isinstance(settings, WarmUp) and settings.until_drift is not None
        if drift is not None:
            sums = drift if self._exchange is None else self._exchange.add_up(drift)
            still = is_still(sums, settings.until_drift)
        if stream.span.ends(step + 1, still):
            stream.warm_up = step + 1

    def _span(self) -> Span:
        """How long the warm-up that begins here may last."""
        trajectory = self._trajectory
        first = trajectory.first_index + trajectory.position
        span = span_of(self._settings.warm_up, lambda: noise_levels(trajectory.scheduler)[first:])
        # without stages there are no boundary tensors to drift
        return Span(span.fewest, span.fewest) if self._settings.layout.stages == 1 else span
