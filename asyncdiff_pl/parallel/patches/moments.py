"""Moments of a GroupNorm's groups: those of a patch, those of several together, and a norm that is given them.

Moments are a mean and 1 / sqrt(variance + eps), which is what norms multiply with. They are combined with the number of
rows behind them, without Bessel's correction, as torch defines GroupNorm.

On a GPU the kernels of torch's SyncBatchNorm do it, each group of channels taken for a channel: written out, these are
dozens of small operations for each norm, and a UNet has dozens of norms. In compiled code and on a CPU they are written
out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

PIECE = 8192
"""Values that one block of a GPU's threads reads, at most: longer groups are read in pieces, side by side."""

MAX_PIECES = 32
"""Pieces of a group, at most."""


def moments(norm: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    """Moments [2, B, groups] of a patch, in float32 at least.

    Args:
        norm: The layer.
        hidden: [B, C, ..., H, W].
    """
    if has_kernels(hidden):
        groups = hidden.reshape(1, hidden.shape[0] * norm.num_groups, -1)
        return torch.stack(_moments_of(groups, norm.eps)).view(2, hidden.shape[0], norm.num_groups)
    groups = hidden.unflatten(1, (norm.num_groups, -1))
    precise = groups if groups.dtype == torch.float64 else groups.float()
    # compiled, this is one pass in any layout
    variance, mean = torch.var_mean(precise, dim=list(range(2, groups.ndim)), correction=0)
    return torch.stack([mean, torch.rsqrt(variance + norm.eps)])


def combine(parts: torch.Tensor, weights: Sequence[int], eps: float) -> torch.Tensor:
    """Moments [2, B, groups] of several patches together, in their order, so that all ranks combine alike.

    Args:
        parts: Moments of each, [patches, 2, B, groups].
        weights: Rows of each.
        eps: What is added to the variances.
    """
    if has_kernels(parts):
        return torch.stack(_combine(*parts.flatten(2).unbind(1), tuple(weights), eps)).view(parts.shape[1:])
    share = _factors(tuple(weight / sum(weights) for weight in weights), parts)[:, None, None]
    mean = (share * parts[:, 0]).sum(0)
    # about the common mean: a difference of squares would lose what is small beside it
    squares = parts[:, 1].pow(-2) - eps + (parts[:, 0] - mean).square()
    return torch.stack([mean, torch.rsqrt((share * squares).sum(0).clamp(min=0) + eps)])


def corrected(own: torch.Tensor, before: torch.Tensor, patch: int, weights: Sequence[int], eps: float) -> torch.Tensor:
    """The moments of all patches a step before, moved by as much as the own ones have changed since, [2, B, groups].

    E[x] and E[x²] are moved. Where that gives a negative variance, the own one is taken.

    Args:
        own: The own ones of this step, [2, B, groups].
        before: Those of all patches, of the step before, [patches, 2, B, groups].
        patch: Which of them is the own one.
        weights: Rows of each.
        eps: What is added to the variances.
    """
    known = torch.cat([before, own[None]]).flatten(2)
    means = known[:, 0]
    # eps on top of each, and once on top of their sum, as the factors add up to 1
    squares = known[:, 1].pow(-2).addcmul(means, means)
    factors = [weight / sum(weights) for weight in weights]
    factors[patch] -= 1
    factor = _factors((*factors, 1.0), known)
    mean, square = _weighted(factor, means), _weighted(factor, squares)
    variance = square.addcmul(mean, mean, value=-1)
    inverse = torch.where(variance < eps, own[1].flatten(), torch.rsqrt(variance))
    return torch.stack([mean, inverse]).view(own.shape)


def apply(norm: nn.GroupNorm, hidden: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Normalises each channel with its group's moments, in one pass.

    Args:
        norm: The layer.
        hidden: [B, C, ..., H, W].
        used: The moments, [2, B, groups].
    """
    batch, channels = hidden.shape[:2]
    each = used[..., None].expand(*used.shape, channels // norm.num_groups)
    mean, inverse = each.reshape(2, batch, channels)
    if torch.compiler.is_compiling():
        # a factor and a term for each channel, which the compiler fuses with what comes before and after
        factor = inverse * (1 if norm.weight is None else norm.weight)
        term = (0 if norm.bias is None else norm.bias) - mean * factor
        # in memory, or it would work them out for each value of the channel
        ones, stride = [1] * (hidden.ndim - 2), [batch * channels, channels, 1]
        both = torch.stack([factor, term]).as_strided([2, batch, channels, *ones], [*stride, *ones])
        return (hidden * both[0] + both[1]).to(hidden.dtype)
    # a batch norm whose channels are all samples'
    flat = hidden.reshape(1, batch * channels, -1)
    weight, bias = (each if each is None or batch == 1 else each.repeat(batch) for each in (norm.weight, norm.bias))
    if has_kernels(hidden):
        found = torch.batch_norm_elemt(flat, weight, bias, mean.flatten(), inverse.flatten(), norm.eps)
    else:
        weight, bias = (None if each is None else each.to(used.dtype) for each in (weight, bias))
        variance = inverse.flatten().pow(-2) - norm.eps
        found = F.batch_norm(flat, mean.flatten(), variance, weight, bias, training=False, eps=norm.eps)
    return found.view(hidden.shape)


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether torch has kernels for a tensor's moments and norm."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and not torch.compiler.is_compiling()


def _moments_of(groups: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of [1, groups, values], on a GPU."""
    count, size = groups.shape[1:]
    pieces = 1
    while size > PIECE * pieces and size % (2 * pieces) == 0 and pieces < MAX_PIECES:
        pieces *= 2
    mean, inverse = torch.batch_norm_stats(groups.view(1, count * pieces, -1), eps)
    if pieces == 1:
        return mean, inverse
    return _combine(mean.view(count, pieces).t(), inverse.view(count, pieces).t(), (1,) * pieces, eps)


def _combine(
    means: torch.Tensor, inverses: torch.Tensor, weights: tuple[int, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of parts together, [groups] each, from those of the parts, [parts, groups], on a GPU."""
    counts = _factors(tuple(map(float, weights)), means)
    return torch.batch_norm_gather_stats_with_counts(means, means, inverses, None, None, 0.0, eps, counts)


def _weighted(factors: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """The sum over the parts [parts, values], each times its factor."""
    if torch.compiler.is_compiling():
        # fused with what it is made from
        return (factors[:, None] * parts).sum(0)
    return torch.mv(parts.t(), factors)


def _factors(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """Numbers as a tensor [len(values)] beside another one."""
    make = _constant.__wrapped__ if torch.compiler.is_compiling() else _constant
    return make(values, like.dtype, like.device)


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # made on the device, since an upload makes a GPU wait
    with torch.inference_mode(False):
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
