"""What a rank computes in a step, from its arguments and its buffers alone: what is run, or recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import join_halves
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.phases import Made
from asyncdiff_pl.parallel.stages.call import StageCall, Stream, like
from asyncdiff_pl.parallel.stages.relay import RelayWorker, check_formats, relay_order
from asyncdiff_pl.parallel.stages.schedule import StepPlan
from asyncdiff_pl.parallel.stages.worker import Worker
from asyncdiff_pl.parallel.warm_up import Drift

Call = Callable[..., Any]


class Steps:
    """Computes the steps of one rank, or of all ranks in one process.

    Args:
        layout: Stages, stride and guidance axis.
        exchange: This rank's messages; None plays all ranks in this process.
        coordinates: Half of the guidance batch and stage rank of this rank.
        are_joined: Tells whether a step ends with no message under way, as a recording must.
    """

    def __init__(
        self,
        layout: Layout,
        exchange: Exchange | None,
        coordinates: tuple[int, int],
        are_joined: Callable[[], bool],
    ) -> None:
        self.layout = layout
        self.exchange = exchange
        self.are_joined = are_joined
        self.half, self.rank = coordinates
        self.halves = [self.half] if exchange else list(range(layout.cfg))
        """Halves of the guidance batch that this process computes."""
        self.ranks = [self.rank] if exchange else list(range(layout.ranks_per_half))
        """Stage ranks that this process plays."""
        self.active: StageCall | None = None
        """What the hooks of units do at present; None lets them run as they are."""

    def exact(self, stream: Stream, plan: StepPlan, call: Call, inputs: list[Inputs], is_compared: bool) -> Made:
        """Runs the whole denoiser on each half.

        Args:
            stream: Which of a step's denoiser calls it is.
            plan: What the ranks do in this step.
            call: The denoiser's forward.
            inputs: Its arguments for each half that this process computes.
            is_compared: Whether the boundary tensors' drift is measured.
        """
        layout = self.layout
        drift = Drift(layout.pipeline_ranks, stream.device) if is_compared else None
        halves = []
        for at, (args, kwargs) in enumerate(inputs):
            if plan.fills:
                first_rank = self.halves[at] * layout.ranks_per_half
                stage_call = StageCall(stream, at, stream.device, drift=drift, first_rank=first_rank)
                result = self._run_in(stage_call, call, args, kwargs)
            else:
                result = call(*args, **kwargs)
            halves.append(_note_result(stream, result))
        if self.exchange is not None and layout.cfg == 2 and not stream.is_whole:
            halves = self.exchange.gather_halves(halves[0])
        return Made(join_halves(halves), drift=drift.sums() if drift else None)

    def in_relay(self, stream: Stream, plan: StepPlan, call: Call, inputs: Inputs, step: int) -> Made:
        """Runs this rank's stage of an exact step, with what the other ranks make in the same.

        Args:
            stream: Which of a step's denoiser calls it is.
            plan: What the ranks do in this step.
            call: The denoiser's forward.
            inputs: Its arguments for this rank's half.
            step: Number of the step, for reports.
        """
        assert self.exchange is not None and stream.program is not None
        check_formats(stream.device)
        worker = RelayWorker(stream.all_workers[0], plan.fills)
        self.exchange.begin(worker, relay_order(stream.program.messages), step)
        stage_call = StageCall(stream, 0, stream.device, worker, sends=True)
        made = _note_result(stream, self._run_in(stage_call, call, *inputs))
        self.exchange.finish()
        worker.finish()
        if self.are_joined():
            stream.join()
        output_rank = stream.program.boundary.output_stage
        estimate, _ = self._estimates(stream, StepPlan(estimate_from=output_rank), {(0, output_rank): made})
        # traffic is that of asynchronous steps
        return Made(estimate)

    def asynchronous(
        self,
        stream: Stream,
        plan: StepPlan,
        call: Call,
        turns: list[tuple[int, Worker]],
        inputs: list[Inputs],
        step: int,
    ) -> Made:
        """Runs stages, with what the other ranks made in the step before.

        Args:
            stream: Which of a step's denoiser calls it is.
            plan: What the ranks do in this step.
            call: The denoiser's forward.
            turns: Half and rank of each run.
            inputs: The denoiser's arguments in each run.
            step: Number of the step, for reports.
        """
        assert stream.program is not None
        made: dict[tuple[int, int], list[torch.Tensor]] = {}
        sent_before = stream.sent_bytes
        for (at, worker), (args, kwargs) in zip(turns, inputs, strict=True):
            exchange = stream.exchanges[at]
            if plan.exchanges:
                exchange.begin(worker, stream.program.messages, step)
            stage_call = StageCall(stream, at, stream.device, worker, plan.exchanges)
            result = self._run_in(stage_call, call, args, kwargs)
            if plan.exchanges:
                exchange.finish()
            if worker.stage == stream.program.boundary.output_stage:
                made[at, worker.rank] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if self.are_joined():
            stream.join()
        estimate, ahead = self._estimates(stream, plan, made)
        return Made(estimate, ahead, sent_bytes=stream.sent_bytes - sent_before)

    def _estimates(
        self, stream: Stream, plan: StepPlan, made: dict[tuple[int, int], list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """The noise estimate of this step on every rank, and what was made of the next one's here, in halves."""
        assert stream.program is not None and stream.result is not None
        layout, output_rank = self.layout, stream.program.boundary.output_stage
        computed = range(1 if stream.is_whole else len(self.halves))
        # with a stride the output stage's rank has made the next step's
        ahead = [made.get((at, output_rank), []) for at in computed] if layout.stride > 1 else []
        halves = [made.get((at, plan.estimate_from), []) if plan.is_new else stream.ahead[at] for at in computed]
        if self.exchange is None:
            return join_halves(halves), ahead
        own, halves = halves[0], []
        for half in range(1 if stream.is_whole else layout.cfg):
            if half == self.half and plan.estimate_from == self.rank:
                tensors = [tensor.contiguous() for tensor in own]
            else:
                likes = [leaf for leaf in stream.result[0] if isinstance(leaf, torch.Tensor)]
                tensors = [torch.empty(leaf.shape, dtype=leaf.dtype, device=stream.device) for leaf in likes]
            self.exchange.broadcast(tensors, half * layout.ranks_per_half + plan.estimate_from)
            halves.append(tensors)
        return join_halves(halves), ahead

    def _run_in(self, stage_call: StageCall, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.active = stage_call
        try:
            return call(*args, **kwargs)
        finally:
            self.active = None


def _note_result(stream: Stream, result: Any) -> list[torch.Tensor]:
    """Remembers what a call's result is like, and gives the tensors in it."""
    leaves, spec = tree_flatten(result)
    stream.result = [like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
