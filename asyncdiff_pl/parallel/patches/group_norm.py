"""GroupNorm of a patch: mean and variance over all patches' rows, as far as the mode lets them be known.

Where all moments are of this step the result is exact, whatever the shares.

Source: DistriFusion (arXiv 2402.19481), section 4, "corrected asynchronous GroupNorm".
"""

from __future__ import annotations

import torch
from torch import nn

from asyncdiff_pl.parallel.patches.moments import apply, combine, corrected, moments
from asyncdiff_pl.parallel.patches.rows import ROWS, Rows
from asyncdiff_pl.parallel.patches.settings import Statistics
from asyncdiff_pl.parallel.patches.sites import Site, site_of
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.swap import Parcels, Trade
from asyncdiff_pl.parallel.patches.traffic import together


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
    used = own = together([moments(norm, part) for part in parts])
    if step.statistics is not Statistics.OWN:
        if torch.compiler.is_compiling():
            of_all = _gather_operation(own, site.number, site.now.order, step.rows.patches)
        else:
            of_all = _gather(own, site.name, step)
        used = together(
            [
                corrected(own[at], of_all[at], patch, sizes, norm.eps)
                if step.statistics is Statistics.CORRECTED
                else combine(of_all[at], sizes, norm.eps)
                for at, patch in enumerate(step.rows.own)
            ]
        )
    found = [apply(norm, part, used[at]) for at, part in enumerate(parts)]
    return found[0] if len(found) == 1 else torch.cat(found, ROWS)


def _gather(own: torch.Tensor, name: str, step: PatchStep, stays: bool = True) -> torch.Tensor:
    """Moments of all patches, of the step before where they are corrected by what the own ones have changed since.

    Args:
        own: Those of the own patches, [own patches, 2, B, groups].
        name: Name of the layer.
        step: The step in work.
        stays: Whether the own ones stay as they are after this.

    Returns:
        For each own patch those of all, [own patches, patches, 2, B, groups]: the others' as this patch knows them.
    """
    rows, traffic = step.rows, step.traffic
    if step.statistics is Statistics.FRESH:
        found, (sends, places) = room_for_all(own, rows)
        traffic.now(sends, places, name)
        if step.keeps_moments:
            traffic.keep(name, places, list(own))
        return found
    received, before = traffic.before(name), traffic.own_before(name)
    if step.sends:
        sends = [dict.fromkeys(parcel, moment) for parcel, moment in zip(received, own, strict=True)]
        traffic.later(name, sends, list(own), stays)
    latest = before if step.statistics is Statistics.CORRECTED else list(own)
    known = [parcel | {patch: latest[at]} for at, (patch, parcel) in enumerate(zip(rows.own, received, strict=True))]
    return together([torch.stack([each[patch] for patch in sorted(each)]) for each in known])


def room_for_all(own: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Trade]:
    """Room for all patches' moments, as `_gather` gives them, with the own ones in it; what is sent, and comes in."""
    found = own.new_empty(len(rows.own), rows.patches, *own.shape[1:])
    places: Parcels = []
    for at, patch in enumerate(rows.own):
        found[at, patch].copy_(own[at])
        places.append({other: found[at, other] for other in range(rows.patches) if other != patch})
    return found, ([dict.fromkeys(place, moment) for place, moment in zip(places, own, strict=True)], places)


@torch.library.custom_op("asyncdiff_pl::moments", mutates_args={"order"})
def _gather_operation(own: torch.Tensor, site: torch.Tensor, order: torch.Tensor, patches: int) -> torch.Tensor:
    it = site_of(site)
    return _gather(own, it.name, it.step, stays=False)


@_gather_operation.register_fake
def _(own: torch.Tensor, site: torch.Tensor, order: torch.Tensor, patches: int) -> torch.Tensor:
    return own.new_empty(own.shape[0], patches, *own.shape[1:])
