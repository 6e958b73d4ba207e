"""Step parallelism on a denoiser: several steps at a time, each on a rank, from latents that the rank foresees.

The pipeline around the denoiser runs on every rank as it always does. Only the denoiser's call is replaced. In the
first step of a round each rank foresees the latents of its own step, computes the noise estimate there, and all ranks
get all estimates. In the round's other steps the denoiser's call returns the one that was made for it: so guidance and
scheduler, on every rank, go through the true latents alone.

Source: ParaStep (NeurIPS 2025), reuse-then-predict; with the scheduler's history kept true on all ranks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import Halves, find_latents, join_halves
from asyncdiff_pl.parallel.hooks import install, uninstall, with_signature
from asyncdiff_pl.parallel.phases import Inputs, Made, Phase, Phases
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.timestep import with_timestep, without_timestep
from asyncdiff_pl.parallel.stages.units import split_modules
from asyncdiff_pl.parallel.steps.place import Answer, Place
from asyncdiff_pl.parallel.steps.settings import Round, StepSettings, round_of
from asyncdiff_pl.parallel.steps.twin import StepCall, Twin, first_tensor
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

FROM_LATENTS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""Arguments that another network makes from a step's latents: nobody has made them for latents that are foreseen."""


@dataclass
class _Stream:
    """One of the denoiser calls that a step makes."""

    signature: Any = None
    is_known: bool = False
    """Whether the sample in work had such a call, exact and of the same kind."""
    is_whole: bool = False
    """Whether the call in work is given to both groups of a guidance axis whole, since it has no guidance batch."""
    place: Place | None = None
    ahead: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Estimates of steps of the round in work that were not asked for yet, by step."""
    likes: list[torch.Tensor] = field(default_factory=list)
    """Tensors like those of a result, on the meta device."""
    result: TreeSpec | None = None
    """How a result is nested."""
    phases: Phases | None = None
    """Recordings of its calls; None where they are not captured."""
    held: Hashable = ()

    def begin(self) -> None:
        """Forgets what belongs to a sample."""
        self.is_known, self.place = False, None
        self.ahead.clear()

    def abandon(self) -> None:
        """No messages are recorded."""


class StepPipeline(TrajectoryListener):
    """Computes several steps of a sample at a time on the ranks of a pipeline, or all of them in one process.

    Args:
        denoiser: The network; its hooks are installed at once.
        trajectory: Where the pipeline stands.
        settings: Layout and warm-up.
        exchange: This rank's messages; None plays all ranks in this process.
        coordinates: Half of the guidance batch and step of a round of this rank.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        settings: StepSettings,
        exchange: Exchange | None = None,
        coordinates: tuple[int, int] = (0, 0),
    ) -> None:
        self.denoiser = denoiser
        self.trajectory = trajectory
        self.settings = settings
        self.exchange = exchange
        self.asynchronous_steps = 0
        """Steps so far that were computed several at a time."""
        self.exact_steps = 0
        """Steps of the sample in work, or of the last one, that were computed one at a time."""
        self.sent_bytes = 0
        """Bytes of noise estimates that this process has sent so far."""
        self.bytes_per_step = 0
        """Bytes that this process sent in the last round, for each of its steps."""
        half, rank = coordinates
        layout = settings.layout
        self._halves_here = [half] if exchange else list(range(layout.cfg))
        self._ranks_here = [rank] if exchange else list(range(layout.steps))
        self._forward = with_signature(denoiser.forward)
        self._signature = inspect.signature(denoiser.forward)
        self.recordings = Recordings(denoiser, self._forward, exchange, settings.capture)
        self._halves = Halves(self._forward, layout.cfg)
        self._streams: dict[int, _Stream] = {}
        self._begin_sample()
        self._met: set[Any] = set()
        self._around_before = trajectory.around_step
        # bound once, so that it can be told from what others put in its place
        self._around = self._around_step
        trajectory.around_step = self._around
        run, self._compiled = self._run_denoiser, None
        if settings.compile != "none":
            pieces = split_modules(denoiser)[1] if settings.compile == "blocks" else {}
            self._compiled = Compiled(denoiser, pieces or {"": denoiser})
            for name, piece in pieces.items():
                install(piece, partial(self._run_piece, name))
            run = self._compiled.allowing_all_kinds(run)
        install(denoiser, run)
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

    @property
    def turns_asynchronous(self) -> bool:
        """Whether the step in work is the last one of a warm-up."""
        return self.trajectory.position - self._begins + 1 == self.settings.warm_up

    def reset(self) -> None:
        """Forgets the sample in work."""
        self._begin_sample()

    def remove(self) -> None:
        """Gives the denoiser back as it was."""
        self._begin_sample()
        for stream in self._streams.values():
            if stream.phases is not None:
                stream.phases.drop()
        self._streams.clear()
        self.trajectory.unsubscribe(self)
        if self.trajectory.around_step is self._around:
            self.trajectory.around_step = self._around_before
        uninstall(self.denoiser)
        if self._compiled is not None:
            self._compiled.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Begins warm-up anew."""
        self.exact_steps = 0
        self._begin_sample()
        self.recordings.look_again()

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """Keeps the latents that a round may begin with."""
        self._latents = first_tensor(output)
        if trajectory.position + 1 >= trajectory.num_steps:
            self._ask()

    def _around_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Keeps the guided estimate of each rank's last own step; it is with the scheduler's other arguments."""
        now = self._round(self.trajectory.position)
        for rank in self._ranks_here:
            # of an exact step all ranks have made the estimate
            if now is None or self.trajectory.position == now.first + rank:
                self._last_calls[rank] = StepCall(args, kwargs)
        return self._around_before(args, kwargs)

    def _begin_sample(self) -> None:
        self._begins = 0
        """Step at which the warm-up in work began."""
        self._latents: torch.Tensor | None = None
        self._last_calls: dict[int, StepCall] = {}
        self._doubt: Answer | None = None
        for stream in self._streams.values():
            stream.begin()
            if stream.phases is not None:
                stream.phases.begin_sample()

    def _round(self, position: int) -> Round | None:
        """The round that a step of the sample belongs to; None for an exact one."""
        begins, settings = self._begins, self.settings
        num_steps = self.trajectory.num_steps - begins
        found = round_of(position - begins, num_steps, settings.layout.steps, settings.warm_up)
        return found and Round(begins + found.first, found.size)

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def _run_denoiser(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trajectory = self.trajectory
        position = trajectory.position
        args, kwargs = self._in_one_form(args, kwargs)
        is_whole = self._halves.are_one(args, kwargs, position == trajectory.call == 0)
        stream = self._prepare(is_whole, args, kwargs)
        now = self._round(position)
        if trajectory.call == 0:
            self.exact_steps += now is None
            self.asynchronous_steps += now is not None
        if self._compiled is not None:
            call = self._compiled.wrap("", call)
        if now is not None and now.first == position and stream.is_known:
            stream.ahead = self._play(stream, now, call, args, kwargs)
        estimate = stream.ahead.pop(position, None)
        if estimate is None:
            estimate = self._compute(stream, call, args, kwargs)
            stream.is_known = True
            stream.likes = [tensor.to("meta") for tensor in estimate]
        assert stream.result is not None
        return tree_unflatten(estimate, stream.result)

    def _play(
        self, stream: _Stream, now: Round, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[int, list[torch.Tensor]]:
        """Computes a round: the estimates of its steps, on all ranks."""
        trajectory = self.trajectory
        first = trajectory.first_index + now.first
        timesteps = list(trajectory.timesteps[first : first + now.size])
        self._look(stream, args, kwargs, timesteps[0])
        made = {}
        for rank in self._ranks_here:
            if rank >= now.size:
                continue
            # lists of its own: UNets take T2I adapters' residuals out of theirs
            own = tree_map(lambda leaf: leaf, (args, kwargs))
            if rank > 0:
                twin = Twin(trajectory.scheduler, self._around_before)
                scaled = twin.foresee(self._latents, timesteps[: rank + 1], self._last_calls[rank])
                own = self._with_latents(stream, *own, scaled)
                own = with_timestep(self._forward, *own, trajectory, now.first + rank)
            made[rank] = [tensor.contiguous() for tensor in self._compute(stream, call, *own)]
        shared = self._share(stream, made, now)
        return {now.first + rank: estimate for rank, estimate in shared.items()}

    def _compute(
        self, stream: _Stream, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Runs the denoiser, or replays it: the tensors of its result, of both halves."""

        def compute(given: list[Inputs]) -> Made:
            halves = []
            for args, kwargs in given:
                leaves, stream.result = tree_flatten(call(*args, **kwargs))
                halves.append(leaves)
            return Made(join_halves(halves))

        halves = self._halves_here[:1] if stream.is_whole else self._halves_here
        inputs = [(args, kwargs) if stream.is_whole else self._halves(args, kwargs, half) for half in halves]
        graphs = self.recordings.num_graphs
        # messages travel outside of recordings: a rank may have nothing to compute in the last round
        made = self.recordings.run(stream, Phase("exact"), inputs, compute, self.trajectory.position)
        self.trajectory.has_one_time_work |= self.recordings.num_graphs > graphs
        if self.exchange is None or self.settings.layout.cfg == 1 or stream.is_whole:
            return made.estimate
        return join_halves(self.exchange.gather_halves(made.estimate))

    def _share(self, stream: _Stream, made: dict[int, list[torch.Tensor]], now: Round) -> dict[int, list[torch.Tensor]]:
        """The estimates of all ranks of a round."""
        layout = self.settings.layout
        copies = (layout.steps - 1) * (1 if self.exchange else layout.cfg)
        sent = copies * sum(tensor.nbytes for estimate in made.values() for tensor in estimate)
        self.sent_bytes += sent
        self.bytes_per_step = sent // now.size
        if self.exchange is None:
            return made
        (own,) = self._ranks_here
        found = dict(made)
        for rank in range(now.size):
            if rank != own:
                device = self._latents.device
                found[rank] = [torch.empty(like.shape, dtype=like.dtype, device=device) for like in stream.likes]
        others = [rank for rank in range(layout.steps) if rank != own]
        messages = []
        for at in range(len(stream.likes)):
            sends = {rank: made[own][at] for rank in others} if own in made else {}
            receives = {rank: found[rank][at] for rank in others if rank < now.size}
            messages += self.exchange.swap(sends, receives, f"the estimates of steps from {now.first} on")
        for message in messages:
            message.wait()
        return found

    # -- the denoiser's arguments -------------------------------------------------------------------------------

    def _prepare(self, is_whole: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Stream:
        """What there is for the call in work."""
        trajectory = self.trajectory
        stream = self._streams.setdefault(trajectory.call, _Stream())
        leaves, spec = tree_flatten(without_timestep(self._forward, args, kwargs))
        signature = (tuple(_what_is_recorded(leaf) for leaf in leaves), spec, is_whole)
        if stream.signature == signature:
            return stream
        made_elsewhere = [name for name in FROM_LATENTS if self._bind(args, kwargs).get(name) is not None]
        if made_elsewhere:
            raise ValueError(
                f"The denoiser is given {made_elsewhere[0]}, which a ControlNet makes from a step's latents; step "
                "parallelism computes later steps before their latents are there: take stages or cfg."
            )
        if trajectory.position > 0 and stream.is_known:
            warnings.warn(
                f"The denoiser's inputs changed at step {trajectory.position} of a sample: warm-up starts again.",
                stacklevel=2,
            )
        if trajectory.call == 0 and trajectory.position > 0:
            self._begins = trajectory.position
            for each in self._streams.values():
                each.begin()
        stream.begin()
        stream.signature, stream.is_whole = signature, is_whole
        trajectory.has_one_time_work |= signature not in self._met
        self._met.add(signature)
        device = find_latents(self._forward, args, kwargs).device
        if stream.phases is None:
            self.recordings.begin(stream, device)
        if self._compiled is not None:
            self._compiled.prepare(device)
            # weights may have another layout
            self.recordings.look_again()
        return stream

    def _look(self, stream: _Stream, args: tuple[Any, ...], kwargs: dict[str, Any], timestep: torch.Tensor) -> None:
        """Makes sure of where the latents are in the denoiser's input, and that they are what the scheduler made."""
        self._ask()
        assert self._latents is not None
        given = find_latents(self._forward, args, kwargs)
        scaled = Twin(self.trajectory.scheduler, self._around_before).scaled(self._latents, timestep)
        if stream.place is None:
            # once a sample: the CPU waits for the GPU to look
            stream.place = Place.find(given, scaled)
            if stream.place is None:
                raise _changed(self.trajectory.position)
        else:
            self._doubt = Answer(stream.place.differs(given, scaled))

    def _ask(self) -> None:
        """Reads whether the latents were where they should be when it was looked last."""
        doubt, self._doubt = self._doubt, None
        if doubt is not None and doubt.read():
            raise _changed(self.trajectory.position)

    def _with_latents(
        self, stream: _Stream, args: tuple[Any, ...], kwargs: dict[str, Any], scaled: torch.Tensor
    ) -> Inputs:
        assert stream.place is not None
        given = find_latents(self._forward, args, kwargs)
        return self._replaced(args, kwargs, stream.place.filled(given, scaled))

    def _in_one_form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The arguments as other steps' are made from them: one recording must do for all steps and ranks."""
        given = find_latents(self._forward, args, kwargs)
        is_laid_out = torch.empty_like(given, device="meta").stride() == given.stride()
        return self._replaced(args, kwargs, given if is_laid_out else given.clone())

    def _replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: torch.Tensor) -> Inputs:
        bound = self._signature.bind(*args, **kwargs)
        bound.arguments[next(iter(bound.arguments))] = latents
        return bound.args, bound.kwargs

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return self._signature.bind(*args, **kwargs).arguments

    def _run_piece(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._compiled is not None
        return self._compiled.wrap(name, call)(*args, **kwargs)


def _changed(position: int) -> ValueError:
    return ValueError(
        f"At step {position} the denoiser is not given the latents that the scheduler made in the step before, scaled "
        "and repeated for guidance: step parallelism cannot foresee what a pipeline or a callback makes of them; take "
        "stages or cfg."
    )


def _what_is_recorded(leaf: Any) -> Any:
    """What of a denoiser's argument a recording would keep: all ranks record in the same exact step."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else None
