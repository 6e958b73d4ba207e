"""Convolutions of a patch: the rows that its kernels reach over the patch's edges come from the neighbours.

Source: DistriFusion (arXiv 2402.19481), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff_pl.parallel.patches.rows import ROWS, Rows
from asyncdiff_pl.parallel.patches.settings import Source
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.traffic import Parcels, contiguous


@dataclass(frozen=True)
class Halo:
    """Rows that a convolution reads beyond its patch.

    Args:
        above: Rows of the patch above.
        below: Rows of the patch below.
    """

    above: int
    below: int

    @classmethod
    def of(cls, convolution: nn.Conv2d, name: str) -> Halo:
        """The halo of a convolution.

        Args:
            convolution: The layer.
            name: Its name, for reports.

        Raises:
            ValueError: A patch's rows do not give as many rows of the result as they would in the whole picture.
        """
        kernel = convolution.dilation[0] * (convolution.kernel_size[0] - 1) + 1
        stride = convolution.stride[0]
        padding = convolution.padding[0] if isinstance(convolution.padding, tuple) else -1
        # H rows give H / stride only if what padding adds and the kernel takes is less than one stride
        if padding < 0 or convolution.padding_mode != "zeros" or not 0 <= 2 * padding + stride - kernel < stride:
            raise ValueError(
                f"{name} is a convolution with kernel {convolution.kernel_size}, stride {convolution.stride} and "
                f"padding {convolution.padding} ({convolution.padding_mode}), which patches cannot compute row by row; "
                "take stages or cfg."
            )
        return cls(padding, max(0, kernel - stride - padding))

    @property
    def is_empty(self) -> bool:
        """Whether nothing beyond the patch is read."""
        return self.above == 0 and self.below == 0


def convolve(name: str, convolution: nn.Conv2d, halo: Halo, hidden: torch.Tensor, step: PatchStep) -> torch.Tensor:
    """A convolution over the own patches' rows.

    Args:
        name: Name of the layer.
        convolution: The layer.
        halo: Rows that it reads beyond a patch.
        hidden: [B, C, H, W], the rows of the own patches.
        step: The step in work.

    Returns:
        [B, C', H / stride, W'], the rows of the own patches.

    Raises:
        ValueError: A patch has fewer rows than its neighbour's kernel reaches into it.
    """
    rows, traffic = step.rows, step.traffic
    parts, sizes = rows.split(hidden), rows.at(hidden.shape[ROWS])
    reach = max(halo.above, halo.below)
    if min(sizes) < reach:
        raise ValueError(
            f"{name} reads {reach} rows beyond its patch, and a patch has {min(sizes)} there; take fewer patches or a "
            "larger picture."
        )
    received: Parcels = [{} for _ in parts]
    if step.source is Source.FRESH:
        received = traffic.now(_edges(parts, rows, halo), _buffers(parts, rows, halo), name)
        if step.keeps_rows:
            traffic.keep(name, received)
    elif step.source is not Source.NONE:
        received = traffic.before(name)
        if step.sends:
            traffic.later(name, _edges(parts, rows, halo))
    found = []
    for patch, part, others in zip(rows.own, parts, received, strict=True):
        above = _rows(part, others.get(patch - 1), halo.above)
        below = _rows(part, others.get(patch + 1), halo.below)
        extended = torch.cat([above, part, below], ROWS)
        padding = (0, convolution.padding[1])
        weight, bias, stride = convolution.weight, convolution.bias, convolution.stride
        found.append(F.conv2d(extended, weight, bias, stride, padding, convolution.dilation, convolution.groups))
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def _edges(parts: list[torch.Tensor], rows: Rows, halo: Halo) -> Parcels:
    """What the neighbours read of each own patch."""
    sends: Parcels = []
    for patch, part in zip(rows.own, parts, strict=True):
        edges = {}
        if patch > 0 and halo.below:
            edges[patch - 1] = part.narrow(ROWS, 0, halo.below)
        if patch + 1 < rows.patches and halo.above:
            edges[patch + 1] = part.narrow(ROWS, part.shape[ROWS] - halo.above, halo.above)
        sends.append(edges)
    return contiguous(sends)


def _buffers(parts: list[torch.Tensor], rows: Rows, halo: Halo) -> Parcels:
    """Room for what each own patch reads of its neighbours."""
    receives: Parcels = []
    for patch, part in zip(rows.own, parts, strict=True):
        shape, buffers = list(part.shape), {}
        for other, count in ((patch - 1, halo.above), (patch + 1, halo.below)):
            if count and 0 <= other < rows.patches:
                shape[ROWS] = count
                buffers[other] = part.new_empty(shape)
        receives.append(buffers)
    return receives


def _rows(part: torch.Tensor, given: torch.Tensor | None, count: int) -> torch.Tensor:
    """A neighbour's rows, or zeros where there is no neighbour."""
    if given is not None:
        return given
    shape = list(part.shape)
    shape[ROWS] = count
    return part.new_zeros(shape)
