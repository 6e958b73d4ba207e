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
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.cross_attention import CrossAttentions
from asyncdiff_pl.parallel.exchange import Exchange, LocalExchange
from asyncdiff_pl.parallel.guidance import Halves
from asyncdiff_pl.parallel.hooks import install, uninstall, with_signature
from asyncdiff_pl.parallel.phases import Made, Phase, number_format
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step
from asyncdiff_pl.parallel.stages.call import Stream
from asyncdiff_pl.parallel.stages.course import Course
from asyncdiff_pl.parallel.stages.placement import Placement
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.stages.programs import Programs
from asyncdiff_pl.parallel.stages.relay import traced_likes
from asyncdiff_pl.parallel.stages.schedule import StepPlan
from asyncdiff_pl.parallel.stages.settings import Settings
from asyncdiff_pl.parallel.stages.steps import Steps
from asyncdiff_pl.parallel.stages.streams import Streams
from asyncdiff_pl.parallel.stages.timestep import with_timestep, without_timestep
from asyncdiff_pl.parallel.stages.units import meta_twin, split_modules
from asyncdiff_pl.parallel.stages.worker import make_workers
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.parallel.weights import device_of_rank


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
        self.program: Program | None = None
        """Graph and cut of the first denoiser call of a step; None before it."""
        self.asynchronous_steps = 0
        """Steps so far in which boundary tensors may have travelled."""
        self.exact_steps = 0
        """Steps of the sample in work, or of the last one, that were computed exactly."""
        self.sent_bytes = 0
        """Bytes of boundary tensors that this process has sent so far."""
        self._course = Course(trajectory, settings, exchange)
        self._last_exact: int | None = None
        self._met: set[Any] = set()
        self._streams = Streams()
        self._forward = with_signature(denoiser.forward)
        self.recordings = Recordings(denoiser, self._forward, exchange, settings.capture)
        self._steps = Steps(settings.layout, exchange, coordinates, lambda: self.recordings.are_made)
        self._halves = Halves(self._forward, settings.layout.cfg)
        self._twin = meta_twin(denoiser)
        self._programs = Programs(denoiser, self._forward, self._twin, settings, exchange)
        containers, pieces = split_modules(denoiser)
        if settings.layout.stages == 1 and settings.compile != "blocks":
            # nothing is decided below the denoiser, which may be compiled as a whole
            containers, pieces = {}, {}
        self._compiled: Compiled | None = None
        if settings.compile != "none":
            self._compiled = Compiled(denoiser, pieces if settings.compile == "blocks" else {"": denoiser})
        self._cross_attentions = CrossAttentions(
            denoiser, self._forward, settings.compile != "none", settings.capture, self._twin
        )
        self._placement: Placement | None = None
        if settings.warm_up_mode == "relay":
            self._placement = Placement(denoiser, pieces, device_of_rank(denoiser))
        for name, module in pieces.items():
            install(module, lambda call, args, kwargs, name=name: self._run_piece(name, call, args, kwargs))
        for name, module in containers.items():
            install(module, lambda call, args, kwargs, name=name: self._run_container(name, call, args, kwargs))
        run = self._run_denoiser
        install(denoiser, run if self._compiled is None else self._compiled.allowing_all_kinds(run))
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

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
        if self.recordings.are_made:
            # recordings know the buffers by their place
            self._streams.join()
        else:
            self._streams.drop()

    def remove(self) -> None:
        """Gives the denoiser back as it was."""
        self._streams.drop()
        self.trajectory.unsubscribe(self)
        uninstall(self.denoiser)
        self._cross_attentions.remove()
        if self._compiled is not None:
            self._compiled.remove()
        if self._placement is not None:
            self._placement.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Begins warm-up anew."""
        self.exact_steps, self._last_exact = 0, None
        self._streams.begin_sample()
        if self._compiled is not None:
            self._compiled.look_again()
        self.recordings.look_again()
        self._cross_attentions.begin_sample()

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def _run_denoiser(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_first = self.trajectory.position == self.trajectory.call == 0
        is_whole = self._halves.are_one(args, kwargs, is_first)
        # without guidance both groups compute the same; one process that plays them computes it once
        halves_here = self._steps.halves[:1] if is_whole else self._steps.halves
        inputs = [(args, kwargs) if is_whole else self._halves(args, kwargs, half) for half in halves_here]
        stream = self._prepare(is_whole, inputs[0])
        step = self.trajectory.position - stream.begins
        plan = self._course.plan(stream, step)
        self._cross_attentions.follow(stream.signature, inputs)
        if self._compiled is not None:
            call = self._compiled.wrap("", call)
        if plan.is_exact:
            estimate = self._exact(stream, plan, step, call, inputs)
        else:
            self.asynchronous_steps += self.trajectory.call == 0
            estimate = self._asynchronous(stream, plan, call, inputs)
        assert stream.result is not None
        return tree_unflatten(_into(estimate, stream.result[0]), stream.result[1])

    def _exact(
        self, stream: Stream, plan: StepPlan, step: int, call: Callable[..., Any], inputs: list[Inputs]
    ) -> list[torch.Tensor]:
        """Makes an exact step; boundary tensors are kept for an asynchronous step that may follow."""
        if self.trajectory.call == 0:
            self.exact_steps += 1
        if plan.fills or self._placement is not None:
            for worker in stream.all_workers:
                worker.restart(number_format(stream.device))
        is_compared = self._course.compares(stream, plan, step)
        phase = Phase("fill" if plan.fills else "relay" if self._placement else "exact", is_compared)
        steps, position = self._steps, self.trajectory.position

        def compute(given: list[Inputs]) -> Made:
            if self._placement is not None:
                return steps.in_relay(stream, plan, call, given[0], position)
            return steps.exact(stream, plan, call, given, is_compared)

        made = self._run_phase(stream, phase, inputs, compute)
        self._course.end_warm_up(stream, step, made.drift)
        if step + 1 == stream.warm_up or (plan.fills and stream.warm_up is not None):
            self._last_exact = position
        return made.estimate

    def _asynchronous(
        self, stream: Stream, plan: StepPlan, call: Callable[..., Any], inputs: list[Inputs]
    ) -> list[torch.Tensor]:
        """Runs each rank's stage on each half, with what the other ranks made in the step before."""
        turns, given = [], []
        for at, half in enumerate(inputs):
            for worker in stream.workers[at]:
                turn = plan.turns[worker.rank]
                if turn is not None:
                    # each run gets lists of its own: UNets take T2I adapters' residuals out of theirs
                    own = tree_map(lambda leaf: leaf, half)
                    turns.append((at, worker))
                    given.append(with_timestep(self._forward, *own, self.trajectory, turn.timestep + stream.begins))
        phase = Phase(
            "asynchronous" if plan.exchanges else "last",
            stages=tuple(turn.stage if turn else None for turn in plan.turns),
            estimate_from=plan.estimate_from,
            parity=stream.all_workers[0].parity,
        )
        steps, position = self._steps, self.trajectory.position
        made = self._run_phase(
            stream, phase, given, lambda given: steps.asynchronous(stream, plan, call, turns, given, position)
        )
        if plan.exchanges:
            for worker in [worker for half in stream.workers[: len(inputs)] for worker in half]:
                worker.turn_over()
        stream.ahead = made.ahead
        return made.estimate

    def _run_phase(
        self, stream: Stream, phase: Phase, inputs: list[Inputs], body: Callable[[list[Inputs]], Made]
    ) -> Made:
        before = self.recordings.num_graphs
        made = self.recordings.run(stream, phase, inputs, body, self.trajectory.position)
        self.trajectory.has_one_time_work |= self.recordings.num_graphs > before
        self.sent_bytes += made.sent_bytes
        return made

    # -- before the first call of a kind ------------------------------------------------------------------------

    def _prepare(self, is_whole: bool, inputs: Inputs) -> Stream:
        """What there is for the call in work: all that belongs to its number in the step and to its inputs' kind."""
        position = self.trajectory.position
        stream = self._streams.of(self.trajectory.call)
        if stream.next_position != position:
            # the sample's first such call, or one after steps without it
            stream.begins = position
            for worker in stream.all_workers:
                worker.settle()
        stream.next_position = position + 1
        leaves, spec = tree_flatten(without_timestep(self._forward, *inputs))
        # a whole batch looks like a half of one twice its size, but what is stale is another thing
        signature = (tuple(_what_is_traced(leaf) for leaf in leaves), spec, is_whole)
        if stream.signature == signature:
            return stream
        if position > stream.begins and self.settings.layout.stages > 1:
            warnings.warn(
                f"The denoiser's inputs changed at step {position} of a sample: warm-up starts again.",
                stacklevel=2,
            )
        stream = self._streams.turn_to(self.trajectory.call, signature, self.recordings.are_made)
        stream.begins, stream.next_position = position, position + 1
        if stream.signature != signature:
            stream.signature, stream.is_whole = signature, is_whole
            stream.device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
            self._fit_out(stream, inputs)
        if self.trajectory.call == 0 and stream.program is not None:
            self.program = stream.program
        return stream

    def _fit_out(self, stream: Stream, inputs: Inputs) -> None:
        """Gives a kind of inputs its program and its buffers."""
        self.trajectory.has_one_time_work |= stream.signature not in self._met
        self._met.add(stream.signature)
        self.recordings.begin(stream, stream.device)
        if self._compiled is not None:
            self._compiled.prepare(stream.device)
        self._cross_attentions.look(stream.signature, inputs, self.recordings.are_made)
        if self.settings.balance == "measured":
            # units are compiled in the form that stays, and then timed
            self._cross_attentions.follow(stream.signature, [inputs])
        if self.settings.layout.stages > 1:
            self._cut_into_stages(stream, inputs)
        if self._compiled is not None and self._placement is not None:
            # the stage's weights are here by now
            self._compiled.prepare(stream.device)
        # they may have another layout or place
        self.recordings.look_again()

    def _cut_into_stages(self, stream: Stream, inputs: Inputs) -> None:
        """Gives a stream the cut for its inputs, and buffers for what its stages exchange."""
        stream.program = self._programs.of(stream.signature, inputs, leaves_out=self.trajectory.call > 0)
        layout, boundary = self.settings.layout, stream.program.boundary
        stream.workers = [make_workers(self._steps.ranks, layout.stages, boundary) for _ in self._steps.halves]
        stream.exchanges = [self.exchange or LocalExchange(workers) for workers in stream.workers]
        if self._placement is not None:
            worker = stream.all_workers[0]
            self._placement.place(stream.program, worker.stage)
            stream.likes = traced_likes(stream.program.graph.values)
            worker.prepare(stream.likes, stream.device)

    # -- modules ------------------------------------------------------------------------------------------------

    def _run_piece(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiled is not None:
            call = self._compiled.wrap(name, call)
        active = self._steps.active
        return active.run_piece(name, call, args, kwargs) if active else call(*args, **kwargs)

    def _run_container(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active = self._steps.active
        return active.run_container(name, call, args, kwargs) if active else call(*args, **kwargs)


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
