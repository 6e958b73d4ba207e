"""Calls of the whole denoiser on a rank: captured, compiled, and each half of the guidance batch on ranks of its own.

Steps differ in their latents and in their timestep alone, whether they are exact or foreseen: one recording does for
all of them, on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.capture import may_capture
from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.cross_attention import CrossAttentions
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import Halves, find_latents, join_halves
from asyncdiff_pl.parallel.hooks import install, uninstall, with_signature
from asyncdiff_pl.parallel.phases import Made, Phase, Phases
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.timestep import without_timestep
from asyncdiff_pl.parallel.stages.units import split_modules
from asyncdiff_pl.parallel.steps.place import Place
from asyncdiff_pl.parallel.steps.settings import StepSettings
from asyncdiff_pl.parallel.trajectory import Trajectory

Call = Callable[..., Any]


@dataclass
class Stream:
    """One of the denoiser calls that a step makes."""

    signature: Any = None
    """What a recording would keep of its arguments: all ranks record in the same exact step."""
    is_whole: bool = False
    """Whether both groups of a guidance axis get the call whole, since it has no guidance batch."""
    is_known: bool = False
    """Whether the sample in work had such a call, exact and of the same kind."""
    place: Place | None = None
    """Where its input has the latents; None before it was looked for in the sample in work."""
    ahead: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Estimates of steps of the round in work that were not asked for yet, by step."""
    likes: list[torch.Tensor] = field(default_factory=list)
    """Tensors like those of a result, on the meta device."""
    result: TreeSpec | None = None
    """How a result is nested."""
    phases: Phases | None = None
    """Recordings of its calls; None where they are not captured."""
    held: Hashable = ()
    """A recording reads nothing but its arguments."""

    def begin(self) -> None:
        """Forgets what belongs to a sample."""
        self.is_known, self.place = False, None
        self.ahead.clear()

    def abandon(self) -> None:
        """No messages are in recordings."""


class Calls:
    """Runs a denoiser whole, on the halves of the guidance batch that are this process's.

    Args:
        denoiser: The network.
        trajectory: Where the pipeline stands.
        settings: Layout, and whether calls are captured and compiled.
        exchange: This rank's messages; None plays all ranks in this process.
        half: Half of the guidance batch of this rank.
    """

    def __init__(
        self, denoiser: nn.Module, trajectory: Trajectory, settings: StepSettings, exchange: Exchange | None, half: int
    ) -> None:
        self._denoiser = denoiser
        self._trajectory = trajectory
        self._settings = settings
        self._exchange = exchange
        self._halves_here = [half] if exchange else list(range(settings.layout.cfg))
        self.forward = with_signature(denoiser.forward)
        """The denoiser's own, whose signature names the arguments."""
        self.recordings = Recordings(denoiser, self.forward, exchange, settings.capture)
        self.streams: dict[int, Stream] = {}
        """What there is for each kind of call, by a number that its owner gives."""
        self._signature = inspect.signature(denoiser.forward)
        self._halves = Halves(self.forward, settings.layout.cfg)
        self._met: set[Any] = set()
        self._compiled: Compiled | None = None
        self._cross_attentions = CrossAttentions(denoiser, self.forward, settings.compile != "none", settings.capture)

    def install(self, run: Call) -> None:
        """Has `run` called in the denoiser's place, as `hooks.install` does."""
        if self._settings.compile != "none":
            pieces = split_modules(self._denoiser)[1] if self._settings.compile == "blocks" else {}
            self._compiled = Compiled(self._denoiser, pieces or {"": self._denoiser})
            for name, piece in pieces.items():
                install(piece, partial(self._run_piece, name))
            run = self._compiled.allowing_all_kinds(run)
        install(self._denoiser, run)

    def remove(self) -> None:
        """Gives the denoiser back as it was, and drops all recordings."""
        for stream in self.streams.values():
            if stream.phases is not None:
                stream.phases.drop()
        self.streams.clear()
        uninstall(self._denoiser)
        self._cross_attentions.remove()
        if self._compiled is not None:
            self._compiled.remove()

    def begin_streams(self) -> None:
        """Has all streams forget what belongs to a sample."""
        for stream in self.streams.values():
            stream.begin()
            if stream.phases is not None:
                stream.phases.begin_sample()

    def begin_sample(self) -> None:
        """Has the network looked at again: it may be another one."""
        if self._compiled is not None:
            self._compiled.look_again()
        self.recordings.look_again()
        self._cross_attentions.begin_sample()

    @property
    def keeps_shapes(self) -> bool:
        """Whether calls are recorded or compiled, for each shape of the arguments anew."""
        if self._compiled is not None or self.recordings.are_made:
            return True
        # before the first call nobody knows whether there will be recordings
        return not self._met and may_capture(self._settings.capture)

    # -- arguments ----------------------------------------------------------------------------------------------

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments by name, as far as they are given."""
        return self._signature.bind(*args, **kwargs).arguments

    def with_latents(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: torch.Tensor) -> Inputs:
        """The arguments with another first one, in the form that all arguments of one kind have."""
        bound = self._signature.bind(*args, **kwargs)
        bound.arguments[next(iter(bound.arguments))] = latents
        return bound.args, bound.kwargs

    def with_timesteps(self, args: tuple[Any, ...], kwargs: dict[str, Any], timesteps: torch.Tensor) -> Inputs:
        """The arguments with a timestep for each input, in the number format of the pipeline's own."""
        bound = self._signature.bind(*args, **kwargs)
        given = bound.arguments["timestep"]
        bound.arguments["timestep"] = timesteps.to(given.dtype) if isinstance(given, torch.Tensor) else timesteps
        return bound.args, bound.kwargs

    def in_one_form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The arguments as those of foreseen steps are made from them, in form and in memory."""
        given = find_latents(self.forward, args, kwargs)
        is_dense = torch.empty_like(given, device="meta").stride() == given.stride()
        return self.with_latents(args, kwargs, given if is_dense else given.clone())

    def signature_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tells a kind of arguments from others; the first call of a sample says what its guidance batch is."""
        is_first = self._trajectory.position == self._trajectory.call == 0
        leaves, spec = tree_flatten(without_timestep(self.forward, args, kwargs))
        return self._halves.are_one(args, kwargs, is_first), tuple(_what_is_recorded(leaf) for leaf in leaves), spec

    # -- calls --------------------------------------------------------------------------------------------------

    def fit_out(self, stream: Stream, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepares a stream for arguments of another kind.

        Args:
            stream: The stream.
            signature: The kind.
            args: Positional arguments of a call.
            kwargs: Its keyword arguments.
        """
        stream.signature, stream.is_whole = signature, signature[0]
        self._trajectory.has_one_time_work |= signature not in self._met
        self._met.add(signature)
        device = find_latents(self.forward, args, kwargs).device
        if stream.phases is None:
            self.recordings.begin(stream, device)
        if self._compiled is not None:
            self._compiled.prepare(device)
        self._cross_attentions.look(signature, self._inputs(stream, args, kwargs)[0], self.recordings.are_made)
        # weights may have another layout, and attention another processor
        self.recordings.look_again()

    def compute(self, stream: Stream, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Runs the denoiser, or replays it.

        Args:
            stream: Which of a step's calls it is.
            call: The denoiser's forward.
            args: Its positional arguments, for both halves.
            kwargs: Its keyword arguments.

        Returns:
            The tensors of its result, of both halves.
        """
        inputs = self._inputs(stream, args, kwargs)
        self._cross_attentions.follow(stream.signature, inputs)
        if self._compiled is not None:
            call = self._compiled.wrap("", call)

        def run(given: list[Inputs]) -> Made:
            halves = []
            for args, kwargs in given:
                leaves, stream.result = tree_flatten(call(*args, **kwargs))
                halves.append(leaves)
            return Made(join_halves(halves))

        graphs = self.recordings.num_graphs
        # messages travel outside of recordings: a rank may have nothing to compute in the last round
        made = self.recordings.run(stream, Phase("exact"), inputs, run, self._trajectory.position)
        self._trajectory.has_one_time_work |= self.recordings.num_graphs > graphs
        if self._exchange is None or self._settings.layout.cfg == 1 or stream.is_whole:
            return made.estimate
        return join_halves(self._exchange.gather_halves(made.estimate))

    def _inputs(self, stream: Stream, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Inputs]:
        if stream.is_whole:
            return [(args, kwargs)]
        return [self._halves(args, kwargs, half) for half in self._halves_here]

    def _run_piece(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._compiled is not None
        return self._compiled.wrap(name, call)(*args, **kwargs)


def _what_is_recorded(leaf: Any) -> Any:
    """What of a denoiser's argument a recording would keep."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else None
