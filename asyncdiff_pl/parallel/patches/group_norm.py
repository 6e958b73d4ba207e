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

from asyncdiff_pl.parallel.patches.rows import ROWS
from asyncdiff_pl.parallel.patches.settings import Statistics
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.traffic import Parcels


def normalise(name: str, norm: nn.GroupNorm, hidden: torch.Tensor, step: PatchStep) -> torch.Tensor:
    """A GroupNorm over the own patches' rows.

    Args:
        name: Name of the layer.
        norm: The layer.
        hidden: [B, C, ..., H, W], the rows of the own patches.
        step: The step in work.

    Returns:
        Like `hidden`.

    Raises:
        ValueError: The layer is given something else than rows and columns.
    """
    if hidden.ndim < 4:
        raise ValueError(
            f"{name} normalises a tensor of shape {tuple(hidden.shape)}, which has no rows that patches could share; "
            "take stages or cfg."
        )
    parts, sizes = step.rows.split(hidden), step.rows.at(hidden.shape[ROWS])
    own = [moments(norm, part) for part in parts]
    used = _moments_to_use(name, own, sizes, step)
    found = [_apply(norm, part, each) for part, each in zip(parts, used, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def moments(norm: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    """Mean and variance [2, B, groups] of a patch, in float32 at least."""
    groups = hidden.unflatten(1, (norm.num_groups, -1)).flatten(2)
    if groups.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        return torch.stack([mean, variance])
    # sums in float32 without a copy of all in it; a difference of squares loses less than 16 bits had lost before
    mean = groups.mean(2, dtype=torch.float32)
    square = torch.linalg.vector_norm(groups, dim=2, dtype=torch.float32).square() / groups.shape[2]
    return torch.stack([mean, (square - mean.square()).clamp(min=0)])


def combine(parts: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """Moments [2, B, groups] of several patches together.

    Args:
        parts: Moments of each.
        weights: Rows of each.
    """
    each = torch.stack(list(parts))
    share = _shares(tuple(weights), each.dtype, each.device)
    mean = (share * each[:, 0]).sum(0)
    # about the common mean: a difference of squares would lose what is small beside it
    variance = (share * (each[:, 1] + (each[:, 0] - mean).square())).sum(0)
    return torch.stack([mean, variance])


@functools.cache
def _shares(weights: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each weight is of all of them, [patches, 1, 1]; uploaded once, since that makes a GPU wait."""
    with torch.inference_mode(False):
        return torch.tensor([weight / sum(weights) for weight in weights], dtype=dtype).to(device).view(-1, 1, 1)


def _moments_to_use(name: str, own: list[torch.Tensor], sizes: Sequence[int], step: PatchStep) -> list[torch.Tensor]:
    """For each own patch the moments that it is normalised with."""
    rows, traffic, statistics = step.rows, step.traffic, step.statistics
    if statistics is Statistics.OWN:
        return own
    others = [[other for other in range(rows.patches) if other != patch] for patch in rows.own]
    sends: Parcels = [dict.fromkeys(each, moment) for each, moment in zip(others, own, strict=True)]
    if statistics is Statistics.FRESH:
        into: Parcels = [{other: torch.empty_like(own[0]) for other in each} for each in others]
        received = traffic.now(sends, into, name)
        if step.keeps_moments:
            traffic.keep(name, received, own)
        return [_all(*each, sizes) for each in zip(rows.own, own, received, strict=True)]
    received, before = traffic.before(name), traffic.own_before(name)
    if step.sends:
        traffic.later(name, sends, own)
    if statistics is Statistics.STALE:
        return [_all(*each, sizes) for each in zip(rows.own, own, received, strict=True)]
    stale = [_all(*each, sizes) for each in zip(rows.own, before, received, strict=True)]
    return [_corrected(*each) for each in zip(own, before, stale, strict=True)]


def _all(patch: int, own: torch.Tensor, others: dict[int, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Moments of all patches together, in the order of their rows, so that all ranks sum alike."""
    each = others | {patch: own}
    return combine([each[number] for number in range(len(sizes))], sizes)


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


def _apply(norm: nn.GroupNorm, hidden: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Normalises each channel with its group's moments, in one pass: a batch norm whose channels are all samples'."""
    batch, channels = hidden.shape[:2]
    mean, variance = used.repeat_interleave(channels // norm.num_groups, dim=2).flatten(1)
    weight, bias = (None if each is None else each.to(used.dtype).repeat(batch) for each in (norm.weight, norm.bias))
    flat = hidden.reshape(1, batch * channels, -1)
    return F.batch_norm(flat, mean, variance, weight, bias, training=False, eps=norm.eps).view(hidden.shape)
