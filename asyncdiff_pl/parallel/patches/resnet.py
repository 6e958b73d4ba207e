"""A GroupNorm and the convolution after it, with an activation alone between them: one message for both.

The edge rows that the convolution reads of its neighbours travel as they are before the norm, together with the norm's
moments: whoever gets them normalises them himself. The norm then gives the patch with these rows around it, the
activation takes them along, and the convolution has nothing to ask. In a synchronous step that is the same to the
number; rows of the step before are another thing (they were normalised with that step's moments), so that other modes
do without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from asyncdiff_pl.parallel.patches.convolution import (
    Halo,
    RowsBeyond,
    around,
    edges,
    edges_to_send,
    empty_beyond,
    put_together,
    room_beyond,
    rows_beyond,
    taken_apart,
)
from asyncdiff_pl.parallel.patches.group_norm import room_for_all
from asyncdiff_pl.parallel.patches.moments import apply, combine, moments
from asyncdiff_pl.parallel.patches.rows import ROWS
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.traffic import together


def norms_and_convolutions(denoiser: nn.Module) -> Iterator[tuple[nn.GroupNorm, nn.Conv2d]]:
    """Pairs of a norm and the convolution that takes, activated, what it gives and nothing else does."""
    for block in denoiser.modules():
        if not isinstance(block, ResnetBlock2D) or block.upsample is not None or block.downsample is not None:
            continue
        # outside of the picture are zeros, and they must stay
        if block.time_embedding_norm != "default" or block.nonlinearity(torch.zeros(())) != 0:
            continue
        for norm, convolution in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            # an adapter puts a layer of its own there
            if isinstance(norm, nn.GroupNorm) and isinstance(convolution, nn.Conv2d):
                yield norm, convolution


def normalise_and_extend(site: Site, norm: nn.GroupNorm, halo: Halo, hidden: torch.Tensor) -> torch.Tensor:
    """A GroupNorm over the own patches' rows and those that the next convolution reads beyond them.

    Args:
        site: Which layer it is.
        norm: The layer.
        halo: Rows that the convolution reads beyond a patch.
        hidden: [B, C, H, W], the rows of the own patches.

    Returns:
        [B, C, H', W]: each own patch with the rows above and below it, zeros outside of the picture.
    """
    rows = site.step.rows
    parts, sizes = rows.split(hidden), rows.at(hidden.shape[ROWS])
    own = together([moments(norm, part) for part in parts])
    first, last = edges(site, parts, sizes, halo)
    if torch.compiler.is_compiling():
        now, numbers = site.now, (halo.above, halo.below, rows.patches)
        of_all, above, below = _swap_operation(own, first, last, *numbers, site.number, now.order)
        beyond = taken_apart(above, below)
    else:
        of_all, beyond = _swap(own, first, last, halo, site.name, site.step)
    found = []
    for at, patch in enumerate(rows.own):
        rows_around = torch.cat(around(parts[at], *beyond[at]), ROWS)
        made = apply(norm, rows_around, combine(of_all[at], sizes, norm.eps))
        # outside of the picture are zeros, after the norm as before it
        if patch == 0:
            made.narrow(ROWS, 0, halo.above).zero_()
        if patch + 1 == rows.patches:
            made.narrow(ROWS, made.shape[ROWS] - halo.below, halo.below).zero_()
        found.append(made)
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def _swap(
    own: torch.Tensor, first: torch.Tensor, last: torch.Tensor, halo: Halo, name: str, step: PatchStep
) -> tuple[torch.Tensor, RowsBeyond]:
    """All patches' moments, and the rows above and below each own patch, zeros outside of the picture.

    Args:
        own: Moments of the own patches, [own patches, 2, B, groups].
        first: First rows of each own patch, [own patches, B, C, reach, W], contiguous.
        last: Their last rows.
        halo: Rows that are read beyond a patch.
        name: Name of the layer.
        step: The step in work.
    """
    rows, traffic = step.rows, step.traffic
    of_all, of_moments = room_for_all(own, rows)
    received = room_beyond(first, rows, halo)
    traffic.now_together([of_moments, (edges_to_send(first, last, rows, halo), received)], name)
    return of_all, rows_beyond(received, first, rows, halo, traffic)


@torch.library.custom_op("asyncdiff_pl::moments_and_rows", mutates_args={"order"})
def _swap_operation(
    own: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    above: int,
    below: int,
    patches: int,
    site: torch.Tensor,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    it = site_of(site)
    of_all, beyond = _swap(own, first, last, Halo(above, below), it.name, it.step)
    return of_all, *put_together(beyond)


@_swap_operation.register_fake
def _(
    own: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    above: int,
    below: int,
    patches: int,
    site: torch.Tensor,
    order: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return own.new_empty(own.shape[0], patches, *own.shape[1:]), *empty_beyond(first, above, below)
