"""Convolutions of a patch: the rows that its kernels reach over the patch's edges come from the neighbours.

Source: DistriFusion (arXiv 2402.19481), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff_pl.parallel.patches.rows import ROWS, Rows
from asyncdiff_pl.parallel.patches.settings import Source
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.swap import Parcels
from asyncdiff_pl.parallel.patches.traffic import Traffic, together

RowsBeyond = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each own patch the rows above and below it."""


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


def convolve(site: Site, convolution: nn.Conv2d, halo: Halo, hidden: torch.Tensor) -> torch.Tensor:
    """A convolution over the own patches' rows.

    Args:
        site: Which layer it is.
        convolution: The layer.
        halo: Rows that it reads beyond a patch.
        hidden: [B, C, H, W], the rows of the own patches.

    Returns:
        [B, C', H / stride, W'], the rows of the own patches.

    Raises:
        ValueError: A patch has fewer rows than its neighbour's kernel reaches into it.
    """
    step = site.step
    parts, sizes = step.rows.split(hidden), step.rows.at(hidden.shape[ROWS])
    first, last = edges(site, parts, sizes, halo)
    if torch.compiler.is_compiling():
        above, below = _halos_operation(first, last, halo.above, halo.below, site.number, site.now.order)
        beyond = taken_apart(above, below)
    else:
        beyond = _halos(first, last, halo, site.name, step)
    return _each(convolution, [torch.cat(around(part, *each), ROWS) for part, each in zip(parts, beyond, strict=True)])


def around(part: torch.Tensor, above: torch.Tensor, below: torch.Tensor) -> list[torch.Tensor]:
    """A patch with the rows above and below it, laid out as it is: another layout would have all laid out anew."""
    is_nhwc = part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_nhwc else torch.contiguous_format
    return [above.contiguous(memory_format=layout), part, below.contiguous(memory_format=layout)]


def convolve_extended(site: Site, convolution: nn.Conv2d, halo: Halo, hidden: torch.Tensor) -> torch.Tensor:
    """The same for rows that have those beyond each patch around them already: one own patch after the other."""
    rows, beyond = site.step.rows, halo.above + halo.below
    sizes = rows.at(hidden.shape[ROWS] - beyond * len(rows.own))
    return _each(convolution, hidden.split([sizes[patch] + beyond for patch in rows.own], ROWS))


def _each(convolution: nn.Conv2d, extended: Sequence[torch.Tensor]) -> torch.Tensor:
    """The convolution of each own patch with the rows around it, one patch after the other."""
    padding = (0, convolution.padding[1])
    weight, bias, stride = convolution.weight, convolution.bias, convolution.stride
    found = [
        F.conv2d(each, weight, bias, stride, padding, convolution.dilation, convolution.groups) for each in extended
    ]
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def edges(
    site: Site, parts: Sequence[torch.Tensor], sizes: Sequence[int], halo: Halo
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last rows of each own patch, as many as a kernel reaches, [own patches, B, C, reach, W].

    Args:
        site: Which layer it is.
        parts: Rows of each own patch.
        sizes: Rows of each patch.
        halo: Rows that are read beyond a patch.

    Raises:
        ValueError: A patch has fewer rows than its neighbour's kernel reaches into it.
    """
    reach = max(halo.above, halo.below)
    if min(sizes) < reach:
        raise ValueError(
            f"{site.name} reads {reach} rows beyond its patch, and a patch has {min(sizes)} there; take fewer patches "
            "or a larger picture."
        )
    # in compiled code what makes the rows lays them out as well
    first = together([part.narrow(ROWS, 0, reach) for part in parts]).contiguous()
    last = together([part.narrow(ROWS, part.shape[ROWS] - reach, reach) for part in parts]).contiguous()
    return first, last


def _halos(
    first: torch.Tensor, last: torch.Tensor, halo: Halo, name: str, step: PatchStep, stays: bool = True
) -> RowsBeyond:
    """What each own patch reads above and below it, zeros where there is nothing.

    Args:
        first: First rows of each own patch, [own patches, B, C, reach, W], contiguous.
        last: Their last rows.
        halo: Rows that are read beyond a patch.
        name: Name of the layer.
        step: The step in work.
        stays: Whether first and last rows stay as they are after this.
    """
    rows, traffic = step.rows, step.traffic
    received: Parcels = [{} for _ in rows.own]
    if step.source is Source.FRESH:
        received = room_beyond(first, rows, halo)
        traffic.now(edges_to_send(first, last, rows, halo), received, name)
        if step.keeps_rows:
            traffic.keep(name, received)
    elif step.source is not Source.NONE:
        received = traffic.before(name)
        if step.sends:
            traffic.later(name, edges_to_send(first, last, rows, halo), stays=stays)
    return rows_beyond(received, first, rows, halo, traffic)


def rows_beyond(received: Parcels, like: torch.Tensor, rows: Rows, halo: Halo, traffic: Traffic) -> RowsBeyond:
    """The rows above and below each own patch: what came in, or zeros.

    Args:
        received: What came in for each own patch.
        like: Rows of the own patches, [own patches, B, C, rows, W].
        rows: The split of the rows.
        halo: Rows that are read beyond a patch.
        traffic: Where there are zeros.
    """
    above, below = (traffic.zeros(_shape(like[0], count), like) for count in (halo.above, halo.below))
    return [
        (parcel.get(patch - 1, above), parcel.get(patch + 1, below))
        for patch, parcel in zip(rows.own, received, strict=True)
    ]


@torch.library.custom_op("asyncdiff_pl::halos", mutates_args={"order"})
def _halos_operation(
    first: torch.Tensor, last: torch.Tensor, above: int, below: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    it = site_of(site)
    return put_together(_halos(first, last, Halo(above, below), it.name, it.step, stays=False))


@_halos_operation.register_fake
def _(
    first: torch.Tensor, last: torch.Tensor, above: int, below: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_beyond(first, above, below)


def put_together(beyond: RowsBeyond) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows above and those below all own patches, as an operation gives them, in memory of their own."""
    above, below = zip(*beyond, strict=True)
    return torch.stack(above), torch.stack(below)


def taken_apart(above: torch.Tensor, below: torch.Tensor) -> RowsBeyond:
    """The same patch by patch."""
    return list(zip(above.unbind(), below.unbind(), strict=True))


def empty_beyond(first: torch.Tensor, above: int, below: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors like those that `put_together` gives, for so many rows."""
    return first.new_empty(_shape(first, above)), first.new_empty(_shape(first, below))


def edges_to_send(first: torch.Tensor, last: torch.Tensor, rows: Rows, halo: Halo) -> Parcels:
    """What each own patch sends of its first and last rows.

    Args:
        first: First rows of each own patch, [own patches, B, C, reach, W], contiguous.
        last: Their last rows.
        rows: The split of the rows.
        halo: Rows that are read beyond a patch.
    """
    sends: Parcels = []
    for at, patch in enumerate(rows.own):
        parcel = {}
        if patch > 0 and halo.below:
            parcel[patch - 1] = first[at].narrow(ROWS, 0, halo.below).contiguous()
        if patch + 1 < rows.patches and halo.above:
            parcel[patch + 1] = last[at].narrow(ROWS, last.shape[ROWS] - halo.above, halo.above).contiguous()
        sends.append(parcel)
    return sends


def room_beyond(first: torch.Tensor, rows: Rows, halo: Halo) -> Parcels:
    """Buffers for the rows above and below each own patch.

    Args:
        first: Rows of the own patches, [own patches, B, C, rows, W].
        rows: The split of the rows.
        halo: Rows that are read beyond a patch.
    """
    return [
        {
            other: first.new_empty(_shape(first[0], count))
            for other, count in ((patch - 1, halo.above), (patch + 1, halo.below))
            if count and 0 <= other < rows.patches
        }
        for patch in rows.own
    ]


def _shape(like: torch.Tensor, count: int) -> tuple[int, ...]:
    """The shape of another number of rows."""
    return (*like.shape[:ROWS], count, like.shape[-1])
