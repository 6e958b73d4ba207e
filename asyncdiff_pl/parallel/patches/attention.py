"""Spatial self-attention of a patch: queries of its own rows, keys and values of others' rows as well.

The projections to keys and values give more tokens than they are given, and what both need travels together; all else
is the attention processor's, so that whatever was set or loaded there keeps its effect. Attention to texts and over
time needs nothing of other patches.

Source: DistriFusion (arXiv 2402.19481), section 4; PCPP (arXiv 2412.02962), section 3, for a part of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from asyncdiff_pl.parallel.patches.rows import Rows, visible_rows
from asyncdiff_pl.parallel.patches.settings import Source
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.traffic import Parcels, Trade

SPATIAL = (Transformer2DModel, TransformerSpatioTemporalModel)
"""Transformers whose blocks attend over rows and columns."""

OVER_TIME = (AnimateDiffTransformer3D, TemporalBasicTransformerBlock)
"""Those in which each pixel attends to itself in other frames."""


def spatial_transformers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the transformers that attend over rows and columns."""
    for name, module in denoiser.named_modules():
        if isinstance(module, SPATIAL):
            yield name, module


def self_attentions(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Names and modules of the attentions of tokens to tokens of the same picture.

    Raises:
        ValueError: One of them has its projections fused, or is where none is expected.
    """
    known = {each for module in denoiser.modules() if isinstance(module, OVER_TIME) for each in module.modules()}
    for parent, transformer in spatial_transformers(denoiser):
        # the blocks over time are in lists of their own
        for at, block in enumerate(transformer.transformer_blocks):
            for name, module in block.named_children():
                known.add(module)
                if isinstance(module, Attention) and not module.is_cross_attention:
                    name = f"{parent}.transformer_blocks.{at}.{name}"
                    # the flag of the module stays when they are taken apart again
                    if isinstance(module.processor, FusedAttnProcessor2_0):
                        raise ValueError(f"{name} has fused projections; call `unfuse_qkv_projections()` first.")
                    yield name, module
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention) and module not in known:
            raise ValueError(f"{name} is an attention of a kind that patches do not know; take stages or cfg.")


def extend(site: Site, keys: torch.Tensor, values: torch.Tensor) -> list[list[torch.Tensor]]:
    """Keys and values that each own patch sees.

    Args:
        site: Which attention it is.
        keys: [B, H · W, C] of the own patches' rows.
        values: The same.

    Returns:
        Keys, then values: for each own patch [B, H' · W, C], in the order of the rows.
    """
    now = site.now
    if torch.compiler.is_compiling():
        both = _extend_operation(keys, values, now.columns, sum(now.seen), site.number, now.order)
    else:
        both = _extend(keys, values, now.columns, site.name, site.step)
    return [list(each.split([rows * now.columns for rows in now.seen], 1)) for each in both]


def seen_rows(height: int, step: PatchStep) -> tuple[int, ...]:
    """Rows of tokens that each own patch sees, its own among them.

    Args:
        height: Rows of all own patches together.
        step: The step in work.
    """
    sizes = step.rows.at(height)
    if step.source is Source.NONE:
        return tuple(sizes[patch] for patch in step.rows.own)
    portion = 1.0 if step.source is Source.FRESH else step.portion
    return tuple(
        sizes[patch] + sum(seen.stop - seen.start for seen in visible_rows(portion, patch, sizes).values())
        for patch in step.rows.own
    )


def _extend(
    keys: torch.Tensor, values: torch.Tensor, columns: int, name: str, step: PatchStep, stays: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that the own patches see, one patch after the other, [B, tokens, C].

    Args:
        keys: Those of the own patches' rows, [B, tokens, C].
        values: The same.
        columns: Tokens in a row.
        name: Name of the attention.
        step: The step in work.
        stays: Whether keys and values stay as they are after this, and may be read in place until the next attention.
    """
    rows, traffic = step.rows, step.traffic
    names = f"{name}.to_k", f"{name}.to_v"
    grids = [each.unflatten(1, (-1, columns)) for each in (keys, values)]
    parts, sizes = [rows.split(grid, dim=1) for grid in grids], rows.at(grids[0].shape[1])
    received: list[Parcels] = [[{} for _ in each] for each in parts]
    if step.source is Source.FRESH:
        # a synchronous step sees all rows
        wholes = [
            [traffic.room((at, patch), part, sum(sizes)) for patch, part in zip(rows.own, each, strict=True)]
            for at, each in enumerate(parts)
        ]
        trades = [_trade(each, own, rows, sizes) for each, own in zip(wholes, parts, strict=True)]
        traffic.now_together(trades, name)
        received = [receives for _, receives in trades]
        if step.keeps_rows:
            for own_name, each in zip(names, received, strict=True):
                traffic.keep(own_name, _seen(each, rows, sizes, step.portion))
        if stays and len(rows.own) == len(keys) == 1:
            return wholes[0][0].flatten(1, 2), wholes[1][0].flatten(1, 2)
    elif step.source is not Source.NONE:
        received = [traffic.before(own_name) for own_name in names]
        if step.sends:
            for own_name, each in zip(names, parts, strict=True):
                # some rows are copied too: what is sent stays in memory until it has left, and as a view all rows would
                stay = stays and step.portion == 1 and all(part.is_contiguous() for part in each)
                traffic.later(own_name, _sends(each, rows, sizes, step.portion), stays=stay)
    found = []
    for own, of_others in zip(parts, received, strict=True):
        seen = []
        for patch, part, others in zip(rows.own, own, of_others, strict=True):
            each = others | {patch: part}
            seen += [each[number] for number in sorted(each)]
        found.append(torch.cat(seen, 1).flatten(1, 2))
    return found[0], found[1]


@torch.library.custom_op("asyncdiff_pl::extend", mutates_args={"order"})
def _extend_operation(
    keys: torch.Tensor, values: torch.Tensor, columns: int, rows: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    it = site_of(site)
    return _extend(keys, values, columns, it.name, it.step, stays=False)


@_extend_operation.register_fake
def _(
    keys: torch.Tensor, values: torch.Tensor, columns: int, rows: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    found = [each.new_empty(each.shape[0], rows * columns, each.shape[2]) for each in (keys, values)]
    return found[0], found[1]


def _trade(wholes: list[torch.Tensor], parts: list[torch.Tensor], rows: Rows, sizes: tuple[int, ...]) -> Trade:
    """All of the own patches' rows, for all others, and room for all of theirs.

    Args:
        wholes: Room for the rows of all patches, one for each own patch, [B, rows, columns, C]; in it, patches lie one
            after the other: of a batch of one it becomes the whole, of others it has to be made from them.
        parts: Rows of each own patch.
        rows: The split of the rows.
        sizes: Rows of each patch.
    """
    sends: Parcels = []
    receives: Parcels = []
    for patch, part, whole in zip(rows.own, parts, wholes, strict=True):
        row = part.numel() // part.shape[1]
        pieces = whole.flatten().split([size * row for size in sizes])
        places = [piece.view(len(part), -1, *part.shape[2:]) for piece in pieces]
        places[patch].copy_(part)
        sends.append({other: places[patch] for other in range(rows.patches) if other != patch})
        receives.append({other: places[other] for other in sends[-1]})
    return sends, receives


def _sends(parts: list[torch.Tensor], rows: Rows, sizes: tuple[int, ...], portion: float) -> Parcels:
    """What the other patches see of the own ones."""
    sends: Parcels = [{} for _ in parts]
    for at, (patch, part) in enumerate(zip(rows.own, parts, strict=True)):
        for other in range(rows.patches):
            seen = visible_rows(portion, other, sizes).get(patch)
            if seen is not None:
                sends[at][other] = part if portion == 1 else part[:, seen]
    return sends


def _seen(received: Parcels, rows: Rows, sizes: tuple[int, ...], portion: float) -> Parcels:
    """Of all other rows those that will be seen."""
    if portion == 1:
        return received
    return [
        {other: parcel[other][:, seen] for other, seen in visible_rows(portion, patch, sizes).items()}
        for patch, parcel in zip(rows.own, received, strict=True)
    ]
