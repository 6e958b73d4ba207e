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
from asyncdiff_pl.parallel.patches.traffic import Parcels, Trade, cloned


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
    parts, sizes = site.step.rows.split(hidden), site.step.rows.at(hidden.shape[ROWS])
    first, last = edges(site, parts, sizes, halo)
    if torch.compiler.is_compiling():
        above, below = _halos_operation(first, last, halo.above, halo.below, site.number, site.now.order)
    else:
        above, below = _halos(first, last, halo, site.name, site.step)
    extended = []
    for at, part in enumerate(parts):
        beyond = [in_layout_of(part, each[at]) for each in (above, below)]
        extended.append(torch.cat([beyond[0], part, beyond[1]], ROWS))
    return _each(convolution, extended)


def convolve_extended(site: Site, convolution: nn.Conv2d, halo: Halo, hidden: torch.Tensor) -> torch.Tensor:
    """The same for rows that have those beyond each patch around them already: one own patch after the other."""
    rows, beyond = site.step.rows, halo.above + halo.below
    sizes = rows.at(hidden.shape[ROWS] - beyond * len(rows.own))
    return _each(convolution, hidden.split([sizes[patch] + beyond for patch in rows.own], ROWS))


def in_layout_of(part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows laid out as those that they are put beside: another layout would have all of them laid out anew."""
    is_nhwc = part.is_contiguous(memory_format=torch.channels_last)
    return rows.contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)


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
    first = torch.stack([part.narrow(ROWS, 0, reach) for part in parts]).contiguous()
    last = torch.stack([part.narrow(ROWS, part.shape[ROWS] - reach, reach) for part in parts]).contiguous()
    return first, last


def _halos(
    first: torch.Tensor, last: torch.Tensor, halo: Halo, name: str, step: PatchStep
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each own patch reads above and below it, zeros where there is nothing.

    Args:
        first: First rows of each own patch, [own patches, B, C, reach, W], contiguous.
        last: Their last rows.
        halo: Rows that are read beyond a patch.
        name: Name of the layer.
        step: The step in work.
    """
    rows, traffic = step.rows, step.traffic
    above, below, (sends, places) = room_beyond(first, last, rows, halo)
    if step.source is Source.FRESH:
        received = traffic.now(sends, places, name)
        if step.keeps_rows:
            traffic.keep(name, received)
    elif step.source is not Source.NONE:
        received = traffic.before(name)
        if step.sends:
            traffic.later(name, cloned(sends))
        for place, parcel in zip(places, received, strict=True):
            for other, tensor in parcel.items():
                place[other].copy_(tensor)
    for at, patch in enumerate(rows.own):
        for room, other in ((above, patch - 1), (below, patch + 1)):
            if step.source is Source.NONE or not 0 <= other < rows.patches:
                room[at].zero_()
    return above, below


@torch.library.custom_op("asyncdiff_pl::halos", mutates_args={"order"})
def _halos_operation(
    first: torch.Tensor, last: torch.Tensor, above: int, below: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    it = site_of(site)
    return _halos(first, last, Halo(above, below), it.name, it.step)


@_halos_operation.register_fake
def _(
    first: torch.Tensor, last: torch.Tensor, above: int, below: int, site: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _room(first, above), _room(first, below)


def room_beyond(
    first: torch.Tensor, last: torch.Tensor, rows: Rows, halo: Halo
) -> tuple[torch.Tensor, torch.Tensor, Trade]:
    """Room for the rows above and below each own patch, and what is sent and comes in of them."""
    above, below = _room(first, halo.above), _room(first, halo.below)
    sends: Parcels = []
    places: Parcels = []
    for at, patch in enumerate(rows.own):
        parcel, place = {}, {}
        if patch > 0:
            if halo.below:
                parcel[patch - 1] = first[at].narrow(ROWS, 0, halo.below).contiguous()
            if halo.above:
                place[patch - 1] = above[at]
        if patch + 1 < rows.patches:
            if halo.above:
                parcel[patch + 1] = last[at].narrow(ROWS, last.shape[ROWS] - halo.above, halo.above).contiguous()
            if halo.below:
                place[patch + 1] = below[at]
        sends.append(parcel)
        places.append(place)
    return above, below, (sends, places)


def _room(edges: torch.Tensor, count: int) -> torch.Tensor:
    """Room for another number of rows."""
    return edges.new_empty((*edges.shape[:ROWS], count, edges.shape[-1]))
