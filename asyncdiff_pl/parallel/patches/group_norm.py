"""GroupNorm of a patch: mean and variance over all patches' rows, as far as the mode lets them be known.

Moments are combined with the number of rows behind them, without Bessel's correction, as torch defines GroupNorm: where
all of them are of this step the result is exact, whatever the shares.

Source: DistriFusion (arXiv 2402.19481), section 4, "corrected asynchronous GroupNorm".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff_pl.parallel.patches.rows import ROWS, Rows
from asyncdiff_pl.parallel.patches.settings import Statistics
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.traffic import Parcels, Trade, cloned


def normalise(site: Site, norm: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    """A GroupNorm over the own patches' rows.

    Args:
        site: Which layer it is.
        norm: The layer.
        hidden: [B, C, ..., H, W], the rows of the own patches.

    Returns:
        Like `hidden`.

    Raises:
        ValueError: The layer is given something else than rows and columns.
    """
    if hidden.ndim < 4:
        raise ValueError(
            f"{site.name} normalises a tensor of shape {tuple(hidden.shape)}, which has no rows that patches could "
            "share; take stages or cfg."
        )
    step, height = site.step, hidden.shape[ROWS]
    parts, sizes = step.rows.split(hidden), step.rows.at(height)
    used = own = torch.stack([moments(norm, part) for part in parts])
    if step.statistics is not Statistics.OWN:
        if torch.compiler.is_compiling():
            of_all = _gather_operation(own, site.number, site.now.order, step.rows.patches)
        else:
            of_all = _gather(own, site.name, step)
        used = torch.stack(
            [
                moments_in_use(step.statistics, patch, own[at], of_all[at], sizes)
                for at, patch in enumerate(step.rows.own)
            ]
        )
    found = [apply(norm, part, used[at]) for at, part in enumerate(parts)]
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def moments(norm: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    """Mean and variance [2, B, groups] of a patch, in float32 at least."""
    groups = hidden.unflatten(1, (norm.num_groups, -1))
    if torch.compiler.is_compiling():
        # one pass in any layout, whatever the number format
        precise = groups if groups.dtype == torch.float64 else groups.float()
        variance, mean = torch.var_mean(precise, dim=list(range(2, groups.ndim)), correction=0)
        return torch.stack([mean, variance])
    groups = groups.flatten(2)
    if groups.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        return torch.stack([mean, variance])
    # sums in float32 without a copy of all in it; a difference of squares loses less than 16 bits had lost before
    mean = groups.mean(2, dtype=torch.float32)
    square = torch.linalg.vector_norm(groups, dim=2, dtype=torch.float32).square() / groups.shape[2]
    return torch.stack([mean, (square - mean.square()).clamp(min=0)])


def combine(parts: torch.Tensor, weights: Sequence[int]) -> torch.Tensor:
    """Moments [2, B, groups] of several patches together, summed in their order, so that all ranks sum alike.

    Args:
        parts: Moments of each, [patches, 2, B, groups].
        weights: Rows of each.
    """
    make = _shares.__wrapped__ if torch.compiler.is_compiling() else _shares
    share = make(tuple(weights), parts.dtype, parts.device)
    mean = (share * parts[:, 0]).sum(0)
    # about the common mean: a difference of squares would lose what is small beside it
    variance = (share * (parts[:, 1] + (parts[:, 0] - mean).square())).sum(0)
    return torch.stack([mean, variance])


@functools.cache
def _shares(weights: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each weight is of all of them, [patches, 1, 1]; made on the device, since an upload makes a GPU wait."""
    with torch.inference_mode(False):
        each = [torch.full((1, 1), weight / sum(weights), dtype=dtype, device=device) for weight in weights]
        return torch.stack(each)


def _gather(own: torch.Tensor, name: str, step: PatchStep) -> torch.Tensor:
    """Moments of all patches, of the step before where they are corrected by what the own ones have changed since.

    Args:
        own: Those of the own patches, [own patches, 2, B, groups].
        name: Name of the layer.
        step: The step in work.

    Returns:
        For each own patch those of all, [own patches, patches, 2, B, groups]: the others' as this patch knows them.
    """
    rows, traffic = step.rows, step.traffic
    found, (sends, places) = room_for_all(own, rows)
    latest: Sequence[torch.Tensor] = list(own)
    if step.statistics is Statistics.FRESH:
        received = traffic.now(sends, places, name)
        if step.keeps_moments:
            traffic.keep(name, received, latest)
    else:
        received, before = traffic.before(name), traffic.own_before(name)
        for place, parcel in zip(places, received, strict=True):
            for other, moment in parcel.items():
                place[other].copy_(moment)
        if step.sends:
            traffic.later(name, cloned(sends), latest)
        if step.statistics is Statistics.CORRECTED:
            latest = before
    for at, patch in enumerate(rows.own):
        found[at, patch].copy_(latest[at])
    return found


def room_for_all(own: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Trade]:
    """Room for all patches' moments, as `_gather` gives them, and what is sent and comes in of them."""
    found = own.new_empty(len(rows.own), rows.patches, *own.shape[1:])
    places: Parcels = [
        {other: found[at, other] for other in range(rows.patches) if other != patch}
        for at, patch in enumerate(rows.own)
    ]
    return found, ([dict.fromkeys(place, moment) for place, moment in zip(places, own, strict=True)], places)


@torch.library.custom_op("asyncdiff_pl::moments", mutates_args={"order"})
def _gather_operation(own: torch.Tensor, site: torch.Tensor, order: torch.Tensor, patches: int) -> torch.Tensor:
    it = site_of(site)
    return _gather(own, it.name, it.step)


@_gather_operation.register_fake
def _(own: torch.Tensor, site: torch.Tensor, order: torch.Tensor, patches: int) -> torch.Tensor:
    return own.new_empty(own.shape[0], patches, *own.shape[1:])


def moments_in_use(
    statistics: Statistics, patch: int, own: torch.Tensor, of_all: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """The moments that a patch is normalised with, [2, B, groups].

    Args:
        statistics: Which those are.
        patch: Number of the patch.
        own: Its moments.
        of_all: Moments of all patches as it knows them, [patches, 2, B, groups].
        sizes: Rows of each patch.
    """
    together = combine(of_all, sizes)
    return _corrected(own, of_all[patch], together) if statistics is Statistics.CORRECTED else together


def _corrected(own: torch.Tensor, own_before: torch.Tensor, all_before: torch.Tensor) -> torch.Tensor:
    """The moments of the step before, moved by as much as the own ones have changed.

    E[x] and E[x²] are moved. Where that gives a negative variance, the own one is taken.
    """
    raw = _raw(all_before) + _raw(own) - _raw(own_before)
    variance = raw[1] - raw[0].square()
    return torch.stack([raw[0], torch.where(variance < 0, own[1], variance)])


def _raw(moment: torch.Tensor) -> torch.Tensor:
    """E[x] and E[x²] for mean and variance."""
    return torch.stack([moment[0], moment[1] + moment[0].square()])


def apply(norm: nn.GroupNorm, hidden: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Normalises each channel with its group's moments, in one pass."""
    batch, channels = hidden.shape[:2]
    mean, variance = used.repeat_interleave(channels // norm.num_groups, dim=2)
    if torch.compiler.is_compiling():
        # a factor and a term for each channel, which the compiler fuses with what comes before and after
        factor = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight)
        term = (0 if norm.bias is None else norm.bias) - mean * factor
        # in memory, or it would work them out for each value of the channel
        ones, stride = [1] * (hidden.ndim - 2), [batch * channels, channels, 1]
        both = torch.stack([factor, term]).as_strided([2, batch, channels, *ones], [*stride, *ones])
        return (hidden * both[0] + both[1]).to(hidden.dtype)
    # a batch norm whose channels are all samples'
    weight, bias = (None if each is None else each.to(used.dtype).repeat(batch) for each in (norm.weight, norm.bias))
    flat = hidden.reshape(1, batch * channels, -1)
    found = F.batch_norm(flat, mean.flatten(), variance.flatten(), weight, bias, training=False, eps=norm.eps)
    return found.view(hidden.shape)
