"""Whether a pipeline's steps are recorded, and running each by its recording if they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.capture import CannotCapture, Recorder, has_graphs, recorder_for
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.fingerprint import fingerprint
from asyncdiff_pl.parallel.phases import Body, Made, Phase, Phases


class Recordable(Protocol):
    """One of the denoiser calls that a step makes."""

    phases: Phases | None

    @property
    def held(self) -> Hashable:
        """Tells the buffers that its steps read and write beside their arguments from others."""

    def abandon(self) -> None:
        """Forgets the messages of a recording that came to nothing."""


class Recordings:
    """Recordings of all denoiser calls of a step, which share one recorder and its memory.

    Args:
        denoiser: The network.
        forward: Its own forward, whose signature names the arguments.
        exchange: This rank's messages; None where it has none.
        is_wanted: Whether steps are to be recorded; None for where there is an NVIDIA GPU.
    """

    def __init__(
        self, denoiser: nn.Module, forward: Callable[..., Any], exchange: Exchange | None, is_wanted: bool | None
    ) -> None:
        self.num_graphs = 0
        """Steps that were recorded so far."""
        self.refusal = ""
        """Why steps are not recorded though it was asked for."""
        self._denoiser = denoiser
        self._forward = forward
        self._exchange = exchange
        self._is_wanted = is_wanted
        self._recorder: Recorder | None = None
        self._network: int | None = None

    @property
    def are_made(self) -> bool:
        """Whether steps are recorded, so that each has to end with nothing under way."""
        return self._recorder is not None

    def look_again(self) -> None:
        """Has the network looked at again: it may be another one."""
        self._network = None

    def begin(self, stream: Recordable, device: torch.device) -> None:
        """Has a stream's steps recorded from now on, if they can be.

        Args:
            stream: The stream.
            device: Where it computes.
        """
        is_wanted = self._is_wanted if self._is_wanted is not None else has_graphs(device)
        if not is_wanted or self.refusal:
            return
        if self._recorder is None:
            backend = dist.get_backend(self._exchange.groups.pipeline) if self._exchange else None
            try:
                self._recorder = recorder_for(device, backend)
            except CannotCapture as refusal:
                self._refuse(str(refusal))
                return
        stream.phases = Phases(self._recorder, self._denoiser, self._forward, device, self._agree, self._refuse)

    def run(self, stream: Recordable, phase: Phase, inputs: list[Inputs], body: Body, step: int) -> Made:
        """Computes a step, or replays one like it.

        Args:
            stream: Which of a step's denoiser calls it is.
            phase: What the step does.
            inputs: Arguments of the denoiser for each half and rank that this process plays in it.
            body: Computes the step.
            step: Its number, for reports.
        """
        if stream.phases is not None and not self.are_made:
            stream.phases.drop()
            stream.phases = None
        if stream.phases is None or phase.is_idle:
            return body(inputs)
        if self._network is None:
            self._network = fingerprint(self._denoiser)
        before = stream.phases.num_recorded
        made = stream.phases.run(phase, inputs, self._network, body, lambda: stream.held if phase.uses_buffers else ())
        self.num_graphs += stream.phases.num_recorded - before
        if not self.are_made:
            # all else was joined: what is left was posted in a recording that came to nothing
            stream.abandon()
        elif self._exchange is not None:
            self._exchange.watch_replay(step)
        return made

    def _agree(self, holds: bool) -> bool:
        return holds if self._exchange is None else self._exchange.all_agree(holds)

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._recorder = None
        warnings.warn(f"Steps are not captured, and run without CUDA graphs: {reason}.", stacklevel=2)
