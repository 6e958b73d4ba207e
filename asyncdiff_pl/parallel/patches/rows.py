"""Which rows of the latents are whose, at each level of a UNet.

A UNet halves its rows from level to level. A patch whose share is a multiple of 2^(levels - 1) rows has whole rows at
each of them: SVD's 72 rows at four levels are 40 + 32, and nothing is ever sent from one share to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

ROWS = -2
"""Dimension of the rows in latents and in the hidden states of convolutions: [..., rows, columns]."""


def row_unit(denoiser: nn.Module) -> int:
    """What the rows of each patch are a multiple of: a UNet halves them between its levels."""
    return 2 ** (len(denoiser.down_blocks) - 1)


def shares(rows: int, patches: int, unit: int) -> tuple[int, ...]:
    """Rows of each patch, as even as whole units allow; the first patches have more.

    Args:
        rows: Rows of the latents.
        patches: Number of patches.
        unit: What each share must be a multiple of.

    Raises:
        ValueError: The rows are no multiple of a unit, or there are fewer units than patches.
    """
    if rows % unit:
        raise ValueError(
            f"The latents have {rows} rows, and a UNet that halves them {unit.bit_length() - 1} times is split into "
            f"patches in multiples of {unit}: change the height to a multiple of {unit} rows of latents."
        )
    units = rows // unit
    if units < patches:
        raise ValueError(
            f"{patches} patches do not fit {rows} rows of latents: each takes a multiple of {unit} rows, so that at "
            f"most {units} fit; take fewer patches or a larger picture."
        )
    each, more = divmod(units, patches)
    return tuple(unit * (each + (patch < more)) for patch in range(patches))


@dataclass(frozen=True)
class Rows:
    """The split of the rows, and which patches this process plays.

    Args:
        shares: Rows of each patch in the latents.
        own: Numbers of the patches that this process plays: one, or all of them.
    """

    shares: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def patches(self) -> int:
        """Number of patches."""
        return len(self.shares)

    @property
    def here(self) -> int:
        """Rows of the latents that this process computes."""
        return sum(self.shares[patch] for patch in self.own)

    def begin(self, patch: int) -> int:
        """First row of a patch in the latents."""
        return sum(self.shares[:patch])

    def at(self, rows: int) -> tuple[int, ...]:
        """Rows of each patch where this process has `rows` rows in all.

        Args:
            rows: Rows of a tensor at some level.

        Raises:
            ValueError: They are no whole fraction of the own rows.
        """
        if rows < 1 or self.here % rows or any(share % (self.here // rows) for share in self.shares):
            raise ValueError(
                f"A layer was given {rows} rows where the latents have {self.here}: this denoiser changes its rows in "
                "a way that patches cannot follow; take stages or cfg."
            )
        return tuple(share // (self.here // rows) for share in self.shares)

    def split(self, tensor: torch.Tensor, dim: int = ROWS) -> list[torch.Tensor]:
        """A tensor of this process, patch by patch.

        Args:
            tensor: Rows of the own patches in dimension `dim`.
            dim: Dimension of the rows.
        """
        sizes = self.at(tensor.shape[dim])
        return list(tensor.split([sizes[patch] for patch in self.own], dim))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The own rows of a tensor with the rows of all patches, in dimension -2, at any level."""
        if len(self.own) == self.patches:
            return tensor
        (patch,) = self.own
        total, rows = sum(self.shares), tensor.shape[ROWS]
        if rows < 1 or total % rows or any(share % (total // rows) for share in self.shares):
            raise ValueError(
                f"An argument of the denoiser has {rows} rows where the latents have {total}: patches cannot be cut "
                "out of it."
            )
        factor = total // rows
        return tensor.narrow(ROWS, self.begin(patch) // factor, self.shares[patch] // factor)


def visible_rows(portion: float, patch: int, sizes: Sequence[int]) -> dict[int, slice]:
    """Rows of other patches that self-attention of a patch sees: the nearest part of each neighbour.

    Args:
        portion: Share of a neighbour's rows; 1 is all rows of all patches.
        patch: Number of the patch.
        sizes: Rows of each patch.

    Returns:
        For each patch that is seen, in order, its rows.

    Source: PCPP (arXiv 2412.02962), section 3; rounded to whole rows.
    """
    if portion == 1:
        return {other: slice(0, size) for other, size in enumerate(sizes) if other != patch}
    found = {}
    if patch > 0 and (count := round(portion * sizes[patch - 1])):
        found[patch - 1] = slice(sizes[patch - 1] - count, sizes[patch - 1])
    if patch + 1 < len(sizes) and (count := round(portion * sizes[patch + 1])):
        found[patch + 1] = slice(0, count)
    return found
