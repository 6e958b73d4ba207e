"""Patch parallelism on a UNet: each rank computes some rows of the picture, layer by layer beside the others.

The pipeline around the denoiser runs on every rank as it always does. Only the denoiser's call is replaced: it takes
the own rows out of the arguments, runs the network on them, in which convolutions, GroupNorms and self-attention look
beyond the patch, and puts the result together again from all ranks' rows.

Source: DistriFusion (arXiv 2402.19481) and PCPP (arXiv 2412.02962).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.cross_attention import CrossAttentions
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import Halves, find_latents, join_halves
from asyncdiff_pl.parallel.hooks import install, uninstall, with_signature
from asyncdiff_pl.parallel.patches.layers import PatchLayers, gains_in_patches
from asyncdiff_pl.parallel.patches.rows import ROWS, Rows, row_unit, shares
from asyncdiff_pl.parallel.patches.settings import PatchSettings, Source
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.swap import LocalSwap, RankSwap
from asyncdiff_pl.parallel.patches.traffic import Traffic
from asyncdiff_pl.parallel.phases import Made, Phase, Phases
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.units import split_modules
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

KINDS = (UNet2DConditionModel, UNetSpatioTemporalConditionModel, UNetMotionModel)

IN_ROWS = frozenset(
    {
        "sample",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    }
)
"""Arguments whose tensors, nested or not, have the picture's rows in dimension -2."""


@dataclass
class _Stream:
    """One of the denoiser calls that a step makes, for the latents that it has."""

    signature: Any
    device: torch.device
    rows: Rows
    traffics: list[Traffic]
    begins: int = 0
    next_position: int | None = None
    result: TreeSpec | None = None
    """How a result is nested."""
    phases: Phases | None = None
    """Recordings of its steps; None where they are not captured."""

    @property
    def held(self) -> Hashable:
        """Tells the buffers of its halves from others."""
        return tuple(traffic.held for traffic in self.traffics)

    def abandon(self) -> None:
        """Forgets the messages of a recording that came to nothing."""
        for traffic in self.traffics:
            traffic.abandon()

    def drop(self) -> None:
        """Gives recordings and buffers back."""
        if self.phases is not None:
            self.phases.drop()
        for traffic in self.traffics:
            traffic.drop()


class PatchPipeline(TrajectoryListener):
    """Runs a denoiser's patches on the ranks of a pipeline, or all of them in one process.

    Args:
        denoiser: The network; its hooks are installed at once.
        trajectory: Where the pipeline stands.
        settings: Layout, mode, warm-up and portion.
        exchange: This rank's messages; None plays all ranks in this process.
        coordinates: Half of the guidance batch and patch of this rank.

    Raises:
        ValueError: The denoiser cannot be run in patches.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        settings: PatchSettings,
        exchange: Exchange | None = None,
        coordinates: tuple[int, int] = (0, 0),
    ) -> None:
        if not isinstance(denoiser, KINDS):
            raise ValueError(
                f"Patches are for the UNets of Stable Diffusion, SDXL, Stable Video Diffusion and AnimateDiff, and the "
                f"denoiser is a {type(denoiser).__name__}; take stages or cfg."
            )
        self.denoiser = denoiser
        self.trajectory = trajectory
        self.settings = settings
        self.exchange = exchange
        self.asynchronous_steps = 0
        """Steps so far that used other patches' values of the step before, or none."""
        self.exact_steps = 0
        """Steps of the sample in work, or of the last one, that were computed exactly."""
        self.bytes_per_step = 0
        """Bytes that this process sent in the last step of its mode: with full_sync any, else an asynchronous one after
        which another one followed."""
        half, patch = coordinates
        layout = settings.layout
        self._halves_here = [half] if exchange else list(range(layout.cfg))
        self._own = (patch,) if exchange else tuple(range(layout.patches))
        self.sent_bytes = 0
        """Bytes of other patches' values that this process has sent so far."""
        self._swap = RankSwap(exchange) if exchange else LocalSwap()
        self._forward = with_signature(denoiser.forward)
        self._signature = inspect.signature(denoiser.forward)
        self.recordings = Recordings(denoiser, self._forward, exchange, settings.capture)
        self._halves = Halves(self._forward, layout.cfg)
        self._unit = row_unit(denoiser)
        self._streams: dict[int, _Stream] = {}
        self._last_exact: int | None = None
        self._met: set[Any] = set()
        # first, since it wants a denoiser whose layers are its own
        self._cross_attentions = CrossAttentions(denoiser, self._forward, settings.compile != "none", settings.capture)
        self._compiled: Compiled | None = None
        if settings.compile != "none":
            self._compiled = Compiled(denoiser, split_modules(denoiser)[1], gains_in_patches)
        self._layers = PatchLayers(denoiser, self._compiled, joins=settings.mode == "full_sync")
        run = self._run_denoiser
        install(denoiser, run if self._compiled is None else self._compiled.allowing_all_kinds(run))
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that hold other patches' values for the next step."""
        return sum(traffic.held_bytes for stream in self._streams.values() for traffic in stream.traffics)

    @property
    def turns_asynchronous(self) -> bool:
        """Whether the step in work is the sample's last synchronous one for now."""
        return self._last_exact == self.trajectory.position

    def reset(self) -> None:
        """Forgets the sample in work, with all stale values."""
        for stream in self._streams.values():
            stream.drop()
        self._streams.clear()

    def remove(self) -> None:
        """Gives the denoiser back as it was."""
        self.reset()
        self.trajectory.unsubscribe(self)
        uninstall(self.denoiser)
        self._cross_attentions.remove()
        if self._compiled is not None:
            self._compiled.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Begins warm-up anew."""
        self.exact_steps, self._last_exact = 0, None
        for stream in self._streams.values():
            stream.next_position = None
            if stream.phases is not None:
                stream.phases.begin_sample()
        self._layers.look_again()
        if self._compiled is not None:
            self._compiled.look_again()
        self.recordings.look_again()
        self._cross_attentions.begin_sample()

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def _run_denoiser(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_free_u()
        trajectory, settings = self.trajectory, self.settings
        position = trajectory.position
        is_whole = self._halves.are_one(args, kwargs, position == trajectory.call == 0)
        halves = self._halves_here[:1] if is_whole else self._halves_here
        inputs = [(args, kwargs) if is_whole else self._halves(args, kwargs, half) for half in halves]
        stream = self._prepare(is_whole, inputs[0])
        self._cross_attentions.follow(stream.signature, inputs)
        number, is_last = position - stream.begins, position + 1 >= trajectory.num_steps
        is_exact = settings.is_synchronous(number)
        if trajectory.call == 0:
            self.exact_steps += is_exact
            self.asynchronous_steps += not is_exact
        # modes without warm-up: the ranks are compared after the first step all the same
        if number + 1 == (settings.warm_up if settings.mode not in ("full_sync", "naive") else 1):
            self._last_exact = position
        steps = [
            PatchStep.of(settings, number, is_last, stream.rows, traffic) for traffic in stream.traffics[: len(inputs)]
        ]
        made = self._run_phase(stream, steps, inputs, call)
        if settings.mode == "full_sync" or not (is_exact or is_last):
            self.bytes_per_step = made.sent_bytes
        return tree_unflatten(made.estimate, stream.result)

    def _run_phase(
        self, stream: _Stream, steps: list[PatchStep], inputs: list[Inputs], call: Callable[..., Any]
    ) -> Made:
        """Computes a step of all halves that this process plays, or replays one like it."""
        step = steps[0]
        is_exact = step.source is Source.FRESH
        if is_exact:
            phase = Phase("fill" if step.keeps else "exact", parity=step.traffic.parity)
        else:
            phase = Phase("asynchronous" if step.sends else "last", parity=step.traffic.parity)

        def compute(given: list[Inputs]) -> Made:
            before = self._swap.sent_bytes
            outputs = [self._compute(stream, *each, call) for each in zip(steps, given, strict=True)]
            if self.exchange is not None and self.settings.layout.cfg == 2 and not stream.signature[0]:
                outputs = self.exchange.gather_halves(outputs[0])
            for each in steps:
                each.traffic.post()
                if self.recordings.are_made:
                    # a recording ends with nothing under way
                    each.traffic.join()
            return Made(join_halves(outputs), sent_bytes=self._swap.sent_bytes - before)

        graphs = self.recordings.num_graphs
        made = self.recordings.run(stream, phase, inputs, compute, self.trajectory.position)
        self.trajectory.has_one_time_work |= self.recordings.num_graphs > graphs
        self.sent_bytes += made.sent_bytes
        for each in steps:
            if each.keeps or each.sends:
                each.traffic.turn_over()
        return made

    def _compute(
        self, stream: _Stream, step: PatchStep, inputs: Inputs, call: Callable[..., Any]
    ) -> list[torch.Tensor]:
        """Runs the denoiser on the own rows, and gathers all rows of its result."""
        bound = self._signature.bind(*inputs[0], **inputs[1])
        if (bound.arguments.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
            raise ValueError(
                "ip_adapter_masks lie over the whole picture, of which a patch sees a part: leave them out, or take "
                "stages or cfg."
            )
        for name in IN_ROWS & bound.arguments.keys():
            bound.arguments[name] = tree_map_only(torch.Tensor, stream.rows.take, bound.arguments[name])
        with self._layers.running(step, stream.device):
            result = call(*bound.args, **bound.kwargs)
        leaves, stream.result = tree_flatten(result)
        return [self._gather(leaf, stream.rows, step.traffic) for leaf in leaves]

    def _prepare(self, is_whole: bool, inputs: Inputs) -> _Stream:
        """What there is for the call in work."""
        trajectory = self.trajectory
        position, latents = trajectory.position, find_latents(self._forward, *inputs)
        # texts and residuals may change: nothing that is stale depends on their shapes
        signature = is_whole, latents.shape, latents.dtype, latents.device
        stream = self._streams.get(trajectory.call)
        if stream is None or stream.signature != signature:
            if stream is not None:
                stream.drop()
                if stream.next_position is not None and self.settings.mode not in ("full_sync", "naive"):
                    warnings.warn(
                        f"The denoiser's inputs changed at step {position} of a sample: warm-up starts again.",
                        stacklevel=2,
                    )
            rows = Rows(shares(latents.shape[ROWS], self.settings.layout.patches, self._unit), self._own)
            is_double = self.settings.mode != "no_sync"
            traffics = [Traffic(self._swap, is_double) for _ in self._halves_here]
            stream = self._streams[trajectory.call] = _Stream(signature, latents.device, rows, traffics, position)
            self.recordings.begin(stream, latents.device)
            if self._compiled is not None:
                self._compiled.prepare(latents.device)
                trajectory.has_one_time_work |= signature not in self._met
                self._met.add(signature)
            self._cross_attentions.look(signature, inputs, self.recordings.are_made)
            # weights may have another layout now, and attention another processor
            self.recordings.look_again()
        elif stream.next_position != position:
            # a new sample, or a call after steps without it
            for traffic in stream.traffics:
                traffic.restart()
            stream.begins = position
        stream.next_position = position + 1
        return stream

    def _gather(self, leaf: torch.Tensor, rows: Rows, traffic: Traffic) -> torch.Tensor:
        """All rows of the result, on every rank."""
        if len(rows.own) == rows.patches:
            return leaf
        (patch,) = rows.own
        own, into, shape = leaf.contiguous(), {}, list(leaf.shape)
        for other in range(rows.patches):
            if other != patch:
                shape[ROWS] = rows.shares[other]
                into[other] = leaf.new_empty(shape)
        sends = [dict.fromkeys(into, own)]
        each = traffic.now(sends, [into], "the estimate")[0] | {patch: leaf}
        return torch.cat([each[number] for number in range(rows.patches)], ROWS)

    def _check_free_u(self) -> None:
        if any(getattr(block, "s1", None) is not None for block in self.denoiser.up_blocks):
            raise ValueError(
                "FreeU filters frequencies of the whole picture, of which a patch sees a part: call `disable_freeu()`, "
                "or take stages or cfg."
            )
