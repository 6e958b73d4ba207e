"""Step parallelism on a denoiser: several steps at a time, each on a rank, from latents that the rank foresees.

The pipeline around the denoiser runs on every rank as it always does. Only the denoiser's call is replaced. In the
first step of a round each rank foresees the latents of its own step, computes the noise estimate there, and all ranks
get all estimates. In the round's other steps the denoiser's call returns the one that was made for it: so guidance and
scheduler, on every rank, go through the true latents alone.

Source: ParaStep (arXiv 2505.14741), reuse-then-predict; with the scheduler's history kept true on all ranks.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_unflatten

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.timestep import with_timestep
from asyncdiff_pl.parallel.steps.calls import Call, Calls, Stream
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
        self._ranks_here = [rank] if exchange else list(range(settings.layout.steps))
        self._calls = Calls(denoiser, trajectory, settings, exchange, half)
        self._begin_sample()
        self._around_before = trajectory.around_step
        # bound once, so that it can be told from what others put in its place
        self._around = trajectory.around_step = self._around_step
        self._calls.install(self._run_denoiser)
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

    @property
    def recordings(self) -> Recordings:
        """Recordings of the denoiser's calls."""
        return self._calls.recordings

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
        self.trajectory.unsubscribe(self)
        if self.trajectory.around_step is self._around:
            self.trajectory.around_step = self._around_before
        self._calls.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Begins warm-up anew."""
        self.exact_steps = 0
        self._begin_sample()
        self._calls.begin_sample()

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """Keeps the latents that a round may begin with."""
        self._latents = first_tensor(output)
        if trajectory.position + 1 >= trajectory.num_steps:
            self._ask()

    def _around_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Keeps each rank's last own estimate, guided: it is among the arguments of the scheduler's step."""
        position = self.trajectory.position
        now = self._round(position)
        for rank in self._ranks_here:
            # that of an exact step is every rank's own
            if now is None or position == now.first + rank:
                self._last_calls[rank] = StepCall(args, kwargs)
        return self._around_before(args, kwargs)

    def _begin_sample(self) -> None:
        self._begins = 0
        """Step at which the warm-up in work began."""
        self._latents: torch.Tensor | None = None
        """What the scheduler made in the step before."""
        self._last_calls: dict[int, StepCall] = {}
        """For each rank that this process plays, the scheduler's step with its last own estimate."""
        self._doubt: Answer | None = None
        """Whether the latents were changed before the last round that was looked at."""
        self._calls.begin_streams()

    def _round(self, position: int) -> Round | None:
        """The round that a step of the sample belongs to; None for an exact one."""
        begins, settings = self._begins, self.settings
        num_steps = self.trajectory.num_steps - begins
        found = round_of(position - begins, num_steps, settings.layout.steps, settings.warm_up)
        return found and Round(begins + found.first, found.size)

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def _run_denoiser(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.trajectory.position
        args, kwargs = self._calls.in_one_form(args, kwargs)
        stream = self._prepare(args, kwargs)
        now = self._round(position)
        if self.trajectory.call == 0:
            self.exact_steps += now is None
            self.asynchronous_steps += now is not None
        if now is not None and now.first == position and stream.is_known:
            stream.ahead = self._play(stream, now, call, args, kwargs)
        estimate = stream.ahead.pop(position, None)
        if estimate is None:
            estimate = self._calls.compute(stream, call, args, kwargs)
            stream.is_known = True
            stream.likes = [tensor.to("meta") for tensor in estimate]
        assert stream.result is not None
        return tree_unflatten(estimate, stream.result)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream:
        """What there is for the call in work."""
        trajectory = self.trajectory
        stream = self._calls.streams.setdefault(trajectory.call, Stream())
        signature = self._calls.signature_of(args, kwargs)
        if stream.signature == signature:
            return stream
        named = self._calls.named(args, kwargs)
        elsewhere = [name for name in FROM_LATENTS if named.get(name) is not None]
        if elsewhere:
            raise ValueError(
                f"The denoiser is given {elsewhere[0]}, which a ControlNet makes from a step's latents; step "
                "parallelism computes later steps before their latents are there: take stages or cfg."
            )
        if stream.is_known:
            warnings.warn(
                f"The denoiser's inputs changed at step {trajectory.position} of a sample: warm-up starts again.",
                stacklevel=2,
            )
            if trajectory.call == 0:
                self._begins = trajectory.position
                for each in self._calls.streams.values():
                    each.begin()
        stream.begin()
        self._calls.fit_out(stream, signature, args, kwargs)
        return stream

    # -- a round ------------------------------------------------------------------------------------------------

    def _play(
        self, stream: Stream, now: Round, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[int, list[torch.Tensor]]:
        """Computes a round: the estimates of its steps, on all ranks."""
        trajectory = self.trajectory
        assert trajectory.timesteps is not None
        first = trajectory.first_index + now.first
        timesteps = list(trajectory.timesteps[first : first + now.size])
        self._look(stream, find_latents(self._calls.forward, args, kwargs), timesteps[0])
        made = {}
        for rank in self._ranks_here:
            if rank < now.size:
                given = self._foresee(stream, now, rank, timesteps, args, kwargs)
                made[rank] = [tensor.contiguous() for tensor in self._calls.compute(stream, call, *given)]
        shared = self._share(stream, made, now)
        return {now.first + rank: estimate for rank, estimate in shared.items()}

    def _foresee(
        self,
        stream: Stream,
        now: Round,
        rank: int,
        timesteps: list[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Inputs:
        """The denoiser's arguments in a rank's step of a round."""
        # lists of its own: UNets take T2I adapters' residuals out of theirs
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        if rank == 0:
            return args, kwargs
        assert self._latents is not None and stream.place is not None
        twin = Twin(self.trajectory.scheduler, self._around_before)
        scaled = twin.foresee(self._latents, timesteps[: rank + 1], self._last_calls[rank])
        latents = stream.place.filled(find_latents(self._calls.forward, args, kwargs), scaled)
        args, kwargs = self._calls.with_latents(args, kwargs, latents)
        return with_timestep(self._calls.forward, args, kwargs, self.trajectory, now.first + rank)

    def _share(self, stream: Stream, made: dict[int, list[torch.Tensor]], now: Round) -> dict[int, list[torch.Tensor]]:
        """The estimates of all ranks of a round."""
        layout = self.settings.layout
        copies = (layout.steps - 1) * (1 if self.exchange else layout.cfg)
        sent = copies * sum(tensor.nbytes for estimate in made.values() for tensor in estimate)
        self.sent_bytes += sent
        self.bytes_per_step = sent // now.size
        if self.exchange is None:
            return made
        assert self._latents is not None
        (own,) = self._ranks_here
        others = [rank for rank in range(layout.steps) if rank != own]
        for rank in others:
            if rank < now.size:
                device = self._latents.device
                made[rank] = [torch.empty(like.shape, dtype=like.dtype, device=device) for like in stream.likes]
        messages = []
        for at in range(len(stream.likes)):
            sends = {rank: made[own][at] for rank in others} if own in made else {}
            receives = {rank: made[rank][at] for rank in others if rank in made}
            messages += self.exchange.swap(sends, receives, f"the estimates of steps from {now.first} on")
        for message in messages:
            message.wait()
        return made

    # -- where the latents are ----------------------------------------------------------------------------------

    def _look(self, stream: Stream, given: torch.Tensor, timestep: torch.Tensor) -> None:
        """Makes sure of where the latents are in the denoiser's input, and that they are what the scheduler made."""
        self._ask()
        assert self._latents is not None
        scaled = Twin(self.trajectory.scheduler, self._around_before).scaled(self._latents, timestep)
        if stream.place is not None:
            self._doubt = Answer(stream.place.differs(given, scaled))
            return
        # once a sample: the CPU waits for the GPU to look
        stream.place = Place.find(given, scaled)
        if stream.place is None:
            raise self._changed()

    def _ask(self) -> None:
        """Reads whether the latents were where they should be when it was looked last."""
        doubt, self._doubt = self._doubt, None
        if doubt is not None and doubt.read():
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(
            f"By step {self.trajectory.position} the denoiser was not given the latents that the scheduler made in the "
            "step before, scaled and repeated for guidance: step parallelism cannot foresee what a pipeline or a "
            "callback makes of them; take stages or cfg."
        )
