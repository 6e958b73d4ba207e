"""The phases of the schedule as recordings: a step that is like an earlier one is replayed, whatever its inputs.

After warm-up all steps of a rank launch the same kernels and messages, but for two things: which of two buffers is read
and which received into, and whether anybody consumes what is sent. So a few recordings do for all samples. The first
step of a kind runs as it always does, so that libraries choose their kernels and ranks meet for the first time, and is
recorded at once. What a replay would freeze makes another recording (capture.py, fingerprint.py).

NCCL wants a message to be in a recording on all of its ranks or on none, and replays of one recording to meet. So all
that decides here is the same on all ranks of a pipeline, and what may not be is agreed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import keystr, tree_flatten_with_path

from asyncdiff_pl.parallel.arguments import Arguments, Inputs
from asyncdiff_pl.parallel.capture import CannotCapture, Recorder, Recording, without_cast_cache
from asyncdiff_pl.parallel.recorded_inputs import StaticInputs, frozen

_ELSEWHERE = "another rank of the pipeline cannot"

MAX_ALIKE = 2
"""Recordings of one phase for different shapes, scales or modes; the one that was not used for longest goes first."""


@dataclass(frozen=True)
class Phase:
    """What a step does that no argument shows.

    Args:
        kind: An exact step, of which nobody keeps what others made ("exact"), in which it goes from stage to stage
            ("relay") or is kept for what follows ("fill"), or an asynchronous one, in which it travels
            ("asynchronous") or is not wanted any more ("last").
        compares: Whether the boundary tensors' drift is measured.
        stages: The stage that each rank computes, None for nothing; empty in an exact step.
        estimate_from: Rank whose result is the noise estimate.
        parity: Which of a rank's two buffers is read.
    """

    kind: Literal["exact", "relay", "fill", "asynchronous", "last"]
    compares: bool = False
    stages: tuple[int | None, ...] = ()
    estimate_from: int = 0
    parity: int = 0

    @property
    def uses_buffers(self) -> bool:
        """Whether boundary tensors are kept or read."""
        return self.kind != "exact"

    @property
    def is_idle(self) -> bool:
        """Whether no rank computes: the estimate is one that was made a step before."""
        return bool(self.stages) and not any(stage is not None for stage in self.stages)


@dataclass
class Made:
    """What a step makes.

    Args:
        estimate: Tensors of the denoiser's result.
        ahead: Estimates of the next step, for each half of the guidance batch.
        drift: What `Drift.sums` gives; None where nothing was compared.
        sent_bytes: Bytes of boundary tensors that were sent.
    """

    estimate: list[torch.Tensor]
    ahead: list[list[torch.Tensor]] = field(default_factory=list)
    drift: torch.Tensor | None = None
    sent_bytes: int = 0

    def copy(self) -> Made:
        """The same in memory of its own."""
        drift = None if self.drift is None else self.drift.clone()
        return Made(_cloned(self.estimate), [_cloned(half) for half in self.ahead], drift, self.sent_bytes)


Body = Callable[[list[Inputs]], Made]
"""Computes a step from its arguments: one call of the denoiser for each half and rank that this process plays."""


@dataclass
class _Recorded:
    recording: Recording
    inputs: StaticInputs
    made: Made
    held: Hashable


class Phases:
    """Recordings of one of a step's denoiser calls.

    Args:
        recorder: Makes them.
        denoiser: The network.
        forward: Its own forward, whose signature names the arguments.
        device: Where it computes.
        agree: Whether something holds on all ranks; each of them asks.
        on_refusal: Is told why there will be no recordings.
    """

    def __init__(
        self,
        recorder: Recorder,
        denoiser: nn.Module,
        forward: Callable[..., Any],
        device: torch.device,
        agree: Callable[[bool], bool],
        on_refusal: Callable[[str], None],
    ) -> None:
        self.num_recorded = 0
        """Recordings made so far."""
        self._recorder = recorder
        self._denoiser = denoiser
        self._device = device
        self._agree = agree
        self._on_refusal = on_refusal
        self._arguments = Arguments(forward)
        self._recorded: dict[Phase, dict[Hashable, _Recorded]] = {}
        self._new: dict[Phase, list[Any]] = {}

    def begin_sample(self) -> None:
        """Begins to count anew what changes within a sample."""
        self._new.clear()

    def run(
        self, phase: Phase, given: list[Inputs], network: Hashable, body: Body, held: Callable[[], Hashable]
    ) -> Made:
        """Replays a step that was met before; runs and records another one.

        Args:
            phase: What the step does.
            given: Arguments of its denoiser calls.
            network: Another one where the network is another one.
            body: Computes the step; it waits for all messages that it posts.
            held: Tells the buffers that `body` reads and writes beside its arguments from others.
        """
        given = [self._with_tensor_timestep(inputs) for inputs in given]
        try:
            arguments = frozen(given)
        except CannotCapture as refusal:
            self._on_refusal(str(refusal))
            return body(given)
        conditions = (arguments, network, _modes(self._device))
        alike = self._recorded.setdefault(phase, {})
        recorded = alike.pop(conditions, None)
        if recorded is not None and recorded.recording.is_sound and recorded.held == held():
            # the newest last
            alike[conditions] = recorded
            recorded.inputs.load(given)
            recorded.recording.replay()
            return recorded.made.copy()
        if recorded is not None:
            recorded.recording.drop()
        reason = self._why_not() or self._what_changes(phase, conditions, given)
        if not self._agree(not reason):
            self._on_refusal(reason or _ELSEWHERE)
            return body(given)
        while len(alike) >= MAX_ALIKE:
            alike.pop(next(iter(alike))).recording.drop()
        inputs = StaticInputs(given, self._device)
        made, is_clean = self._recorder.rehearse(lambda: self._compute(body, inputs), Made.copy)
        if not self._agree(is_clean):
            self._recorder.begin_anew()
        try:
            recording, kept = self._recorder.record(lambda: self._compute(body, inputs))
            alike[conditions] = _Recorded(recording, inputs, kept, held())
            self.num_recorded += 1
        except CannotCapture as refusal:
            reason = str(refusal)
        if not self._agree(not reason):
            self._on_refusal(reason or _ELSEWHERE)
        return made

    def drop(self) -> None:
        """Gives all recordings back."""
        for alike in self._recorded.values():
            for recorded in alike.values():
                recorded.recording.drop()
        self._recorded.clear()

    def _compute(self, body: Body, inputs: StaticInputs) -> Made:
        with without_cast_cache(self._device):
            return body(inputs.given)

    def _with_tensor_timestep(self, inputs: Inputs) -> Inputs:
        """Makes a timestep that is a number a tensor, as a denoiser would: a replay would repeat the number."""
        given = self._arguments.find(inputs, "timestep")
        if not isinstance(given, int | float):
            return inputs
        timestep = torch.tensor([given], dtype=torch.float64 if isinstance(given, float) else torch.int64)
        return self._arguments.replace(inputs, "timestep", timestep)

    def _why_not(self) -> str:
        if torch.is_grad_enabled():
            return "gradients are on; call the pipeline under torch.no_grad()"
        for name, module in self._denoiser.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                return f"{name} drops out values at random, as in training; call `eval()`"
            others = module._diffusers_hook.hooks if hasattr(module, "_diffusers_hook") else {}
            if hasattr(module, "_hf_hook") or any("offload" in other for other in others):
                return f"the weights of {name or 'the denoiser'} are moved by hooks (offloading)"
        return ""

    def _what_changes(self, phase: Phase, conditions: Any, given: list[Inputs]) -> str:
        """Why a phase would be recorded again and again in a sample; empty if it would not."""
        new = self._new.setdefault(phase, [])
        new.append(conditions)
        if len(new) <= MAX_ALIKE:
            return ""
        (before, _), (now, spec) = new[-2][0], conditions[0]
        changed = []
        if new[-2][0][1] == spec:
            paths = [path for path, _ in tree_flatten_with_path(given)[0]]
            changed = [self._name(path) for path, *pair in zip(paths, before, now, strict=True) if pair[0] != pair[1]]
        what = f"the denoiser's {changed[0]}" if changed else "what a graph would freeze"
        return f"{what} changes from step to step"

    def _name(self, path: tuple[Any, ...]) -> str:
        """An argument by name, for its place among the arguments of several calls."""
        _, kind, first, *rest = path
        name = self._arguments.names[first.idx] if kind.idx == 0 else first.key
        return name + keystr(tuple(rest))


def number_format(device: torch.device) -> Hashable:
    """The number format that autocast gives to what is computed on a device; False where it gives none."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)


def _modes(device: torch.device) -> Hashable:
    """What decides, beside its arguments, which kernels a call launches."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        number_format(device),
    )


def _cloned(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]
