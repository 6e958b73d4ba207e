"""AsyncDiff on a denoiser: hooks that make each rank compute its stage, and the calls in between (arXiv 2406.06911).

The pipeline around the denoiser runs on every rank as it always does. Only the denoiser's call is replaced: it looks up
in the schedule what this rank computes, lets the units of its stage run, stands in for all others what they computed
in the step before, and returns the noise estimate that the schedule names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.exchange import Exchange, LocalExchange
from asyncdiff_pl.parallel.guidance import find_latents, join_halves, split_batch
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step
from asyncdiff_pl.parallel.stages.call import StageCall, Stream, like
from asyncdiff_pl.parallel.stages.costs import agreed_costs
from asyncdiff_pl.parallel.stages.hooks import install, uninstall
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.stages.schedule import StepPlan, plan_step
from asyncdiff_pl.parallel.stages.settings import Settings
from asyncdiff_pl.parallel.stages.timestep import with_timestep, without_timestep
from asyncdiff_pl.parallel.stages.units import Graph, meta_twin, split_modules
from asyncdiff_pl.parallel.stages.worker import make_workers
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.parallel.warm_up import Drift, Span, WarmUp, is_still, noise_levels, span_of

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a denoiser call."""


class StagePipeline(TrajectoryListener):
    """Runs a denoiser's stages on the ranks of a pipeline, or all of them in one process.

    Args:
        denoiser: The network; its hooks are installed at once.
        trajectory: Where the pipeline stands.
        settings: Layout, warm-up and cut.
        exchange: This rank's messages; None plays all ranks in this process.
        coordinates: Half of the guidance batch and stage rank of this rank.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        settings: Settings,
        exchange: Exchange | None = None,
        coordinates: tuple[int, int] = (0, 0),
    ) -> None:
        self.denoiser = denoiser
        self.trajectory = trajectory
        self.settings = settings
        self.exchange = exchange
        layout = settings.layout
        self.half, self.rank = coordinates
        self.halves = [self.half] if exchange else list(range(layout.cfg))
        self.ranks = [self.rank] if exchange else list(range(layout.stage_ranks))
        self.program: Program | None = None
        """Graph and cut of the first denoiser call of a step; None before it."""
        self.asynchronous_steps = 0
        """Steps so far in which boundary tensors may have travelled."""
        self.exact_steps = 0
        """Steps of the sample in work, or of the last one, that were computed exactly."""
        self._last_exact: int | None = None
        self._first_batch = 0
        self._sent_before = 0
        self._programs: dict[Any, Program] = {}
        self._streams: dict[int, Stream] = {}
        self._forward = denoiser.forward
        self._twin = meta_twin(denoiser)
        self._active: StageCall | None = None
        containers, pieces = split_modules(denoiser)
        if settings.layout.stages == 1 and settings.compile != "blocks":
            # nothing is decided below the denoiser, which may be compiled as a whole
            containers, pieces = {}, {}
        self._compiled: Compiled | None = None
        if settings.compile != "none":
            self._compiled = Compiled(denoiser, pieces if settings.compile == "blocks" else {"": denoiser})
        for name, module in pieces.items():
            install(module, lambda call, args, kwargs, name=name: self._run_piece(name, call, args, kwargs))
        for name, module in containers.items():
            install(module, lambda call, args, kwargs, name=name: self._run_container(name, call, args, kwargs))
        run = self._run_denoiser
        install(denoiser, run if self._compiled is None else self._compiled.allowing_all_kinds(run))
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

    @property
    def sent_bytes(self) -> int:
        """Bytes of boundary tensors that this process has sent so far."""
        if self.exchange is not None:
            return self.exchange.sent_bytes
        streams = self._streams.values()
        return self._sent_before + sum(exchange.sent_bytes for stream in streams for exchange in stream.exchanges)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of boundary tensors that travel in an asynchronous step, over all ranks of a half; as traced."""
        if self.program is None:
            return 0
        layout, boundary = self.settings.layout, self.program.boundary
        copies = [1 + (layout.stride - 1) * (stage == boundary.output_stage) for stage in range(layout.stages)]
        return bytes_per_step(self.program.graph, boundary, copies)

    @property
    def turns_asynchronous(self) -> bool:
        """Whether the step in work ends the warm-up of one of its denoiser calls, or is a refresh."""
        return self._last_exact == self.trajectory.position

    def reset(self) -> None:
        """Forgets the sample in work, with all stale values."""
        self._sent_before = self.sent_bytes
        for stream in self._streams.values():
            for worker in [worker for half in stream.workers for worker in half]:
                worker.drop()
            for exchange in stream.exchanges:
                exchange.drop()
        self._streams.clear()

    def remove(self) -> None:
        """Gives the denoiser back as it was."""
        self.reset()
        self.trajectory.unsubscribe(self)
        uninstall(self.denoiser)
        if self._compiled is not None:
            self._compiled.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Begins warm-up anew."""
        self.exact_steps, self._last_exact = 0, None
        for stream in self._streams.values():
            stream.next_position = None

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def _run_denoiser(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = self._streams.setdefault(self.trajectory.call, Stream())
        stream.is_whole = self._is_without_guidance(args, kwargs)
        # without guidance both groups compute the same; one process that plays them computes it once
        halves_here = self.halves[:1] if stream.is_whole else self.halves
        inputs = [self._half_of(stream, args, kwargs, half) for half in halves_here]
        self._prepare(stream, inputs[0])
        step = self.trajectory.position - stream.begins
        num_steps = self.trajectory.num_steps - stream.begins
        plan = self._plan(stream, step, num_steps)
        if self._compiled is not None:
            call = self._compiled.wrap("", call)
        if plan.is_exact:
            halves = self._exact(stream, plan, step, call, inputs)
            if self.exchange is not None and self.settings.layout.cfg == 2 and not stream.is_whole:
                halves = self.exchange.gather_halves(halves[0])
        else:
            self.asynchronous_steps += self.trajectory.call == 0
            halves = self._asynchronous(stream, plan, call, inputs)
        assert stream.result is not None
        return tree_unflatten(_into(join_halves(halves), stream.result[0]), stream.result[1])

    def _is_without_guidance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has no guidance batch, unlike the sample's first: guidance ended, or never belonged to it."""
        if self.settings.layout.cfg == 1:
            return False
        batch = find_latents(self._forward, args, kwargs).shape[0]
        if self.trajectory.position == self.trajectory.call == 0:
            self._first_batch = batch
        return 2 * batch == self._first_batch

    def _half_of(self, stream: Stream, args: tuple[Any, ...], kwargs: dict[str, Any], half: int) -> Inputs:
        if self.settings.layout.cfg == 1 or stream.is_whole:
            return args, kwargs
        return split_batch(self._forward, args, kwargs, half)

    def _plan(self, stream: Stream, step: int, num_steps: int) -> StepPlan:
        settings, layout = self.settings, self.settings.layout
        if step == 0:
            stream.span = self._span()
            stream.warm_up = stream.span.length
        return plan_step(
            step,
            num_steps,
            stages=layout.stages,
            stride=layout.stride,
            warm_up=stream.warm_up,
            refresh_every=settings.refresh_every,
            time_shift=settings.time_shift,
            output_stage=stream.program.boundary.output_stage if stream.program else None,
        )

    def _span(self) -> Span:
        """How long the warm-up that begins here may last."""
        trajectory = self.trajectory
        first = trajectory.first_index + trajectory.position
        span = span_of(self.settings.warm_up, lambda: noise_levels(trajectory.scheduler)[first:])
        # without stages there are no boundary tensors to drift
        return Span(span.fewest, span.fewest) if self.settings.layout.stages == 1 else span

    def _exact(
        self, stream: Stream, plan: StepPlan, step: int, call: Callable[..., Any], inputs: list[Inputs]
    ) -> list[list[torch.Tensor]]:
        """Runs the whole denoiser on each half; boundary tensors are kept for an asynchronous step that may follow."""
        if self.trajectory.call == 0:
            self.exact_steps += 1
        if plan.fills:
            for worker in [worker for half in stream.workers for worker in half]:
                # a buffer that nobody read may still be received into
                worker.settle()
        # only steps of one warm-up are compared: what is there before it is another sample's
        is_compared = plan.fills and stream.warm_up is None and step > 0 and step + 1 >= stream.span.fewest
        drift = Drift(self.settings.layout.pipeline_ranks, self._device) if is_compared else None
        halves = []
        for at, (args, kwargs) in enumerate(inputs):
            if plan.fills:
                first_rank = self.halves[at] * self.settings.layout.stage_ranks
                stage_call = StageCall(stream, at, self._device, drift=drift, first_rank=first_rank)
                result = self._run_in(stage_call, call, args, kwargs)
            else:
                result = call(*args, **kwargs)
            leaves, spec = tree_flatten(result)
            stream.result = [like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
            halves.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        self._end_warm_up(stream, step, drift)
        if step + 1 == stream.warm_up or (plan.fills and stream.warm_up is not None):
            self._last_exact = self.trajectory.position
        return halves

    def _end_warm_up(self, stream: Stream, step: int, drift: Drift | None) -> None:
        """Decides, alike on all ranks, whether a warm-up whose end was not known is over with this step."""
        if stream.warm_up is not None:
            return
        settings, still = self.settings.warm_up, False
        assert isinstance(settings, WarmUp) and settings.until_drift is not None
        if drift is not None:
            sums = drift.sums() if self.exchange is None else self.exchange.add_up(drift.sums())
            still = is_still(sums, settings.until_drift)
        if stream.span.ends(step + 1, still):
            stream.warm_up = step + 1

    def _asynchronous(
        self,
        stream: Stream,
        plan: StepPlan,
        call: Callable[..., Any],
        inputs: list[Inputs],
    ) -> list[list[torch.Tensor]]:
        assert stream.program is not None
        made: dict[tuple[int, int], list[torch.Tensor]] = {}
        for at, (args, kwargs) in enumerate(inputs):
            for worker in stream.workers[at]:
                turn = plan.turns[worker.rank]
                if turn is None:
                    continue
                exchange = stream.exchanges[at]
                if plan.exchanges:
                    exchange.begin(worker, stream.program.messages, self.trajectory.position)
                step = turn.timestep + stream.begins
                # each run gets lists of its own: UNets take T2I adapters' residuals out of theirs
                own_args, own_kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
                given = with_timestep(self._forward, own_args, own_kwargs, self.trajectory, step)
                stage_call = StageCall(stream, at, self._device, worker, plan.exchanges)
                result = self._run_in(stage_call, call, *given)
                if plan.exchanges:
                    exchange.finish()
                if worker.stage == stream.program.boundary.output_stage:
                    made[at, worker.rank] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if plan.exchanges:
                for worker in stream.workers[at]:
                    worker.turn_over()
        return self._estimates(stream, plan, made)

    def _estimates(
        self, stream: Stream, plan: StepPlan, made: dict[tuple[int, int], list[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """The noise estimate of this step, in halves, on every rank."""
        assert stream.program is not None
        output_rank = stream.program.boundary.output_stage
        ahead, halves = stream.ahead, []
        # what the output stage made for the next step; only its rank has it
        computed = range(1 if stream.is_whole else len(self.halves))
        stream.ahead = [made.get((at, output_rank), []) for at in computed]
        for at in computed:
            halves.append(made.get((at, plan.estimate_from), []) if plan.is_new else ahead[at])
        if self.exchange is None:
            return halves
        own, layout = halves[0], self.settings.layout
        halves = []
        for half in range(1 if stream.is_whole else layout.cfg):
            assert stream.result is not None
            if half == self.half and plan.estimate_from == self.rank:
                tensors = [tensor.contiguous() for tensor in own]
            else:
                device = self._device
                tensors = [
                    torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
                    for leaf in stream.result[0]
                    if isinstance(leaf, torch.Tensor)
                ]
            self.exchange.broadcast(tensors, half * layout.stage_ranks + plan.estimate_from)
            halves.append(tensors)
        return halves

    # -- before the first call of a kind ------------------------------------------------------------------------

    def _prepare(self, stream: Stream, inputs: Inputs) -> None:
        position = self.trajectory.position
        if stream.next_position != position:
            # the sample's first such call, or one after steps without it
            stream.begins = position
            for worker in [worker for half in stream.workers for worker in half]:
                worker.settle()
        stream.next_position = position + 1
        leaves, spec = tree_flatten(without_timestep(self._forward, *inputs))
        # a whole batch looks like a half of one twice its size, but what is stale is another thing
        signature = (tuple(_what_is_traced(leaf) for leaf in leaves), spec, stream.is_whole)
        if stream.signature == signature:
            return
        if position > stream.begins and self.settings.layout.stages > 1:
            warnings.warn(
                f"The denoiser's inputs changed at step {position} of a sample: warm-up starts again.",
                stacklevel=2,
            )
        for worker in [worker for half in stream.workers for worker in half]:
            worker.drop()
        stream.signature, stream.begins = signature, position
        stream.likes.clear()
        self._device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        if self.settings.layout.stages > 1:
            self._cut_into_stages(stream, inputs)
        if self._compiled is not None:
            self._compiled.prepare(self._device)

    def _cut_into_stages(self, stream: Stream, inputs: Inputs) -> None:
        """Gives a stream the cut for its inputs, and buffers for what its stages exchange."""
        signature = stream.signature
        if signature not in self._programs:
            self._programs[signature] = Program.make(
                *(self._twin, self._forward, self.settings.layout, self.settings.cut, *inputs),
                leaves_out=self.trajectory.call > 0,
                measure=self._measure(inputs),
            )
        stream.program = self._programs[signature]
        if self.trajectory.call == 0:
            self.program = stream.program
        layout, boundary = self.settings.layout, stream.program.boundary
        stream.workers = [make_workers(self.ranks, layout.stages, boundary) for _ in self.halves]
        self._sent_before += sum(exchange.sent_bytes for exchange in stream.exchanges)
        stream.exchanges = [self.exchange or LocalExchange(workers) for workers in stream.workers]

    def _measure(self, inputs: Inputs) -> Callable[[Graph], list[int]] | None:
        """What measures a cut's costs at some inputs; None where operations are counted."""
        settings = self.settings
        if settings.balance == "operations":
            return None
        return lambda graph: agreed_costs(self.denoiser, self._forward, graph, *inputs, settings.compile, self.exchange)

    # -- modules ------------------------------------------------------------------------------------------------

    def _run_in(
        self, stage_call: StageCall, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._active = stage_call
        try:
            return call(*args, **kwargs)
        finally:
            self._active = None

    def _run_piece(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiled is not None:
            call = self._compiled.wrap(name, call)
        return self._active.run_piece(name, call, args, kwargs) if self._active else call(*args, **kwargs)

    def _run_container(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._active.run_container(name, call, args, kwargs) if self._active else call(*args, **kwargs)


def _into(tensors: list[torch.Tensor], leaves: list[Any]) -> list[Any]:
    """Puts tensors, in order, where a result has tensors."""
    rest = iter(tensors)
    return [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _what_is_traced(leaf: Any) -> Any:
    """What of a denoiser's argument decides which units run, and on what shapes."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    # numbers that a tensor is multiplied by may be others in each step
    return leaf if isinstance(leaf, bool | int | str) else None
