"""Spatial self-attention of a patch: queries of its own rows, keys and values of others' rows as well.

The projections to keys and values give more tokens than they are given, and what both make of a token lies and travels
side by side; all else is the attention processor's, so that whatever was set or loaded there keeps its effect.
Attention to texts and over time needs nothing of other patches.

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

from asyncdiff_pl.parallel.patches.rows import ROWS, Rows, visible_rows
from asyncdiff_pl.parallel.patches.settings import Source
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.swap import Parcels, Trade
from asyncdiff_pl.parallel.projections import JoinedProjections

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


def extend(site: Site, both: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values that each own patch sees.

    Args:
        site: Which attention it is.
        both: Keys and values of the own patches' rows side by side, [B, H · W, 2 C].

    Returns:
        The same for each own patch, [B, H' · W, 2 C], in the order of the rows.
    """
    now = site.now
    if torch.compiler.is_compiling():
        whole = _extend_operation(both, now.columns, sum(now.seen), site.number, now.order)
    else:
        whole = _extend(both, now.columns, site.name, site.step)
    return list(whole.split([rows * now.columns for rows in now.seen], 1))


def project_and_extend(
    site: Site, projections: JoinedProjections, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Queries of the own patch, and keys and values of all rows where they come in, without a copy.

    Keys and values are made first, and queries while they travel.

    Args:
        site: Which attention it is.
        projections: Its projections.
        tokens: Tokens of the own patch's rows, [B, H · W, C].

    Returns:
        Queries, [1, H · W, C], and keys and values side by side, [1, H' · W, 2 C]; None where that cannot be.
    """
    room, weight = site.now.room, projections.weight
    if room is None or weight is None or not torch.compiler.is_compiling() or len(tokens) != 1:
        return None
    queries, *others = projections.sizes
    if room.shape[-1] != sum(others) or not room.dtype == weight.dtype == tokens.dtype:
        return None
    operands = tokens, weight, projections.bias, room, queries
    return _project_operation(*operands, site.number, site.now.order), room.flatten(1, 2)


def room_of(transformer: nn.Module, hidden: torch.Tensor, step: PatchStep) -> torch.Tensor | None:
    """Where keys and values of all rows come together in a transformer's attentions, for compiled code to read them.

    The compiler is told that an exchange writes there, and so reads it before the next one. Elsewhere it gets copies.

    Args:
        transformer: One of `spatial_transformers`.
        hidden: What it is given, [B, C, H, W].
        step: The step in work.

    Returns:
        [1, H, W, 2 C]; None where they have to be put together from what came in, or where more is done with them.
    """
    if step.source is not Source.FRESH or step.keeps_rows or len(step.rows.own) != 1 or len(hidden) != 1:
        return None
    if torch.is_autocast_enabled(hidden.device.type):
        return None
    like = hidden.new_empty(1, 0, hidden.shape[-1], 2 * transformer.inner_dim)
    return step.traffic.room(step.rows.own[0], like, sum(step.rows.at(hidden.shape[ROWS])))


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


def _extend(both: torch.Tensor, columns: int, name: str, step: PatchStep, stays: bool = True) -> torch.Tensor:
    """Keys and values that the own patches see, one patch after the other, [B, tokens, 2 C].

    Args:
        both: Those of the own patches' rows, [B, tokens, 2 C].
        columns: Tokens in a row.
        name: Name of the attention.
        step: The step in work.
        stays: Whether `both` stays as it is after this, and what is returned may be read in place until the next
            attention.
    """
    rows, traffic = step.rows, step.traffic
    grid = both.unflatten(1, (-1, columns))
    parts, sizes = rows.split(grid, dim=1), rows.at(grid.shape[1])
    received: Parcels = [{} for _ in parts]
    if step.source is Source.FRESH:
        # a synchronous step sees all rows
        wholes = [traffic.room(patch, part, sum(sizes)) for patch, part in zip(rows.own, parts, strict=True)]
        sends, received = _trade(wholes, parts, rows, sizes)
        traffic.now(sends, received, name)
        if step.keeps_rows:
            traffic.keep(name, _seen(received, rows, sizes, step.portion))
        if stays and len(rows.own) == len(both) == 1:
            return wholes[0].flatten(1, 2)
    elif step.source is not Source.NONE:
        received = traffic.before(name)
        if step.sends:
            # some rows are copied too: what is sent stays in memory until it has left, and as a view all rows would
            stays = stays and step.portion == 1 and all(part.is_contiguous() for part in parts)
            traffic.later(name, _sends(parts, rows, sizes, step.portion), stays=stays)
    seen = []
    for patch, part, others in zip(rows.own, parts, received, strict=True):
        each = others | {patch: part}
        seen += [each[number] for number in sorted(each)]
    return torch.cat(seen, 1).flatten(1, 2)


@torch.library.custom_op("asyncdiff_pl::extend", mutates_args={"order"})
def _extend_operation(
    both: torch.Tensor, columns: int, rows: int, site: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    it = site_of(site)
    return _extend(both, columns, it.name, it.step, stays=False)


@_extend_operation.register_fake
def _(both: torch.Tensor, columns: int, rows: int, site: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return both.new_empty(both.shape[0], rows * columns, both.shape[2])


@torch.library.custom_op("asyncdiff_pl::project_and_extend", mutates_args={"room", "order"})
def _project_operation(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    room: torch.Tensor,
    queries: int,
    site: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    it = site_of(site)
    rows, traffic = it.step.rows, it.step.traffic
    (patch,) = rows.own
    own, others = _pieces(room, patch, rows.at(tokens.shape[1] // room.shape[2]))
    keys_and_values = weight[queries:].t()
    if bias is None:
        torch.mm(tokens[0], keys_and_values, out=own.flatten(0, 2))
    else:
        torch.addmm(bias[queries:], tokens[0], keys_and_values, out=own.flatten(0, 2))
    messages = traffic.begin([([dict.fromkeys(others, own)], [others])], it.name)
    made = nn.functional.linear(tokens, weight[:queries], None if bias is None else bias[:queries])
    for message in messages:
        message.wait()
    return made


@_project_operation.register_fake
def _(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    room: torch.Tensor,
    queries: int,
    site: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    return tokens.new_empty(*tokens.shape[:-1], queries)


def _trade(wholes: list[torch.Tensor], parts: list[torch.Tensor], rows: Rows, sizes: tuple[int, ...]) -> Trade:
    """All of the own patches' rows, for all others, and room for all of theirs.

    Args:
        wholes: Room for the rows of all patches, one for each own patch, [B, rows, columns, C]: of a batch of one it
            becomes the whole, of others it has to be made from the pieces.
        parts: Rows of each own patch.
        rows: The split of the rows.
        sizes: Rows of each patch.
    """
    sends: Parcels = []
    receives: Parcels = []
    for patch, part, whole in zip(rows.own, parts, wholes, strict=True):
        own, others = _pieces(whole, patch, sizes)
        sends.append(dict.fromkeys(others, own.copy_(part)))
        receives.append(others)
    return sends, receives


def _pieces(whole: torch.Tensor, patch: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A patch's own place in room for the rows of all, where patches lie one after the other, and those of the others.

    Args:
        whole: The room, [B, rows, columns, C].
        patch: Number of the patch.
        sizes: Rows of each patch.
    """
    row = whole.numel() // sum(sizes)
    pieces = whole.flatten().split([size * row for size in sizes])
    places = {number: piece.view(len(whole), -1, *whole.shape[2:]) for number, piece in enumerate(pieces)}
    return places.pop(patch), places


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
