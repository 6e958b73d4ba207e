"""The layers that look beyond a patch, as compiled code knows them: by numbers that are tensors.

What such a layer tells other patches is an operation that torch.compile does not look into (group_norm.py,
convolution.py, attention.py). A name among its arguments would be a constant of the compiled code, and each block would
need code of its own; a number in a tensor is an input, so that equal blocks share a graph. All of these operations
write into one and the same tensor, as far as the compiler knows: it keeps them in the order which all ranks keep to.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch

from asyncdiff_pl.parallel.patches.step import PatchStep

_NUMBERS = itertools.count()
_SITES: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


def _constant(value: int) -> torch.Tensor:
    # tensors made in inference mode could not be written outside of it
    with torch.inference_mode(False):
        return torch.tensor(value)


@dataclass
class Now:
    """Where a denoiser stands in its call."""

    step: PatchStep | None = None
    """The step in work; None outside of one."""
    columns: int = 0
    """Columns of the tokens of the transformer in work."""
    seen: tuple[int, ...] = ()
    """Rows of tokens that each own patch sees in it."""
    room: torch.Tensor | None = None
    """Where keys and values of all rows come together in it, [1, H, W, 2 C], if compiled code may read them there."""
    extended: tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]] | None = None
    """Of the attention in work: what keys and values are made from, and both as each own patch sees them."""
    seen_by: int = 0
    """Which of the own patches attends."""
    order: torch.Tensor = field(default_factory=lambda: _constant(0))
    """What the operations of compiled code seem to write into."""


class Site:
    """A layer that looks beyond a patch.

    Args:
        name: Its name in the denoiser.
        now: Where the denoiser stands.
    """

    def __init__(self, name: str, now: Now) -> None:
        number = next(_NUMBERS)
        self.name = name
        self.now = now
        self.number = _constant(number)
        """Which it is of all layers in this process."""
        _SITES[number] = self

    @property
    def step(self) -> PatchStep:
        """The step in work."""
        assert self.now.step is not None
        return self.now.step


def site_of(number: torch.Tensor) -> Site:
    """The layer with a number; numbers are on the CPU, so that nobody waits for a GPU."""
    return _SITES[int(number)]
