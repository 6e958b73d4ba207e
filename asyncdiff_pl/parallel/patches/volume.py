"""How many bytes patches give each other in a step, by the shapes that a whole denoiser's layers are given.

One forward on the meta device is enough for any number of patches, mode and portion: what travels for a layer is so
many of its rows (convolutions, attention), or its moments (GroupNorms), as the layers themselves say.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.parallel.patches.attention import self_attentions, spatial_transformers
from asyncdiff_pl.parallel.patches.convolution import Halo
from asyncdiff_pl.parallel.patches.rows import ROWS, visible_rows
from asyncdiff_pl.parallel.patches.settings import PatchSettings, Source, Statistics


@dataclass(frozen=True)
class Volume:
    """Bytes that one patch gets from the others in a step.

    Args:
        waited_for: What it waits for, since it is of this step.
        beside: What comes in beside the computation, for the next step.
        held: Buffers that keep it between steps.
    """

    waited_for: int = 0
    beside: int = 0
    held: int = 0

    @property
    def received(self) -> int:
        """All that it gets."""
        return self.waited_for + self.beside


@dataclass
class PatchShapes:
    """What the layers that look beyond a patch are given in a call of the whole denoiser.

    Args:
        convolutions: Bytes of a row of each convolution's input, and the rows that it reads beyond a patch.
        norms: Bytes of the moments of each GroupNorm.
        tokens: Rows of each self-attention's keys, likewise of its values, and bytes of one of them.
    """

    convolutions: list[tuple[int, Halo]] = field(default_factory=list)
    norms: list[int] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)

    def volume(self, shares: Sequence[int], patch: int, settings: PatchSettings, step: int) -> Volume:
        """What a patch gets in a step that is not the sample's last.

        Args:
            shares: Rows of each patch in the latents.
            patch: Number of the patch.
            settings: Mode, warm-up and portion.
            step: Number of the step.
        """
        source, statistics = settings.rows_from(step), settings.statistics(step)
        portion = 1.0 if source is Source.FRESH else settings.portion
        rows = self._rows(shares, patch, portion) if source in (Source.FRESH, Source.STALE) else 0
        moments = (len(shares) - 1) * sum(self.norms) if statistics is not Statistics.OWN else 0
        waited_for = rows * (source is Source.FRESH) + moments * (statistics is Statistics.FRESH)
        return Volume(waited_for, rows + moments - waited_for, self._held(shares, patch, settings))

    def _held(self, shares: Sequence[int], patch: int, settings: PatchSettings) -> int:
        """Bytes of buffers after warm-up: two for each thing, one where nothing new comes in."""
        source, statistics = settings.rows_from(settings.warm_up), settings.statistics(settings.warm_up)
        held = 0
        if source in (Source.STALE, Source.FROZEN):
            held += self._rows(shares, patch, settings.portion)
        if statistics in (Statistics.STALE, Statistics.CORRECTED):
            held += (len(shares) - 1) * sum(self.norms)
        return held * (1 if source is Source.FROZEN else 2)

    def _rows(self, shares: Sequence[int], patch: int, portion: float) -> int:
        """Bytes of other patches' rows."""
        is_first, is_last = patch == 0, patch + 1 == len(shares)
        halos = sum(
            size * (halo.above * (not is_first) + halo.below * (not is_last)) for size, halo in self.convolutions
        )
        tokens = 0
        for rows, size in self.tokens:
            sizes = [share * rows // sum(shares) for share in shares]
            tokens += size * sum(seen.stop - seen.start for seen in visible_rows(portion, patch, sizes).values())
        return halos + tokens


@contextlib.contextmanager
def watched(denoiser: nn.Module) -> Iterator[PatchShapes]:
    """Notes within this context what the layers of a denoiser are given.

    Args:
        denoiser: The network, whole; one that can be run in patches.

    Raises:
        ValueError: It has a layer that cannot be run in patches.
    """
    found = PatchShapes()
    rows = 0

    def transformer(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal rows
        rows = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).shape[ROWS]

    def projection(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.tokens.append((rows, output.nbytes // rows))

    def convolution(halo: Halo, module: nn.Module, args: Any) -> None:
        found.convolutions.append((args[0].nbytes // args[0].shape[ROWS], halo))

    def norm(module: nn.GroupNorm, args: Any) -> None:
        # mean and variance, in float32 at least
        found.norms.append(2 * args[0].shape[0] * module.num_groups * max(4, args[0].element_size()))

    handles = []
    try:
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d) and not (halo := Halo.of(module, name)).is_empty:
                handles.append(module.register_forward_pre_hook(functools.partial(convolution, halo)))
            elif isinstance(module, nn.GroupNorm):
                handles.append(module.register_forward_pre_hook(norm))
        for _, module in spatial_transformers(denoiser):
            handles.append(module.register_forward_pre_hook(transformer, with_kwargs=True))
        for _, attention in self_attentions(denoiser):
            handles += [part.register_forward_hook(projection) for part in (attention.to_k, attention.to_v)]
        yield found
    finally:
        for handle in handles:
            handle.remove()
