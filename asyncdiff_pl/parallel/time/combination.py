"""What a pipeline makes of a denoiser's output before the scheduler gets it: seen in one step, repeated for others.

Pipelines guide (u + s (c - u)) and leave out what the scheduler has no use for (DiT's learned variance). Whether a
pipeline does just that, and with which s, is found out from what the denoiser gave and what the scheduler got.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncdiff_pl.parallel.steps.place import Place

TOLERANCE = 16
"""Roundings of the number format that an output may differ by: pipelines guide in the denoiser's own."""


@dataclass(frozen=True)
class Combination:
    """How estimates become the scheduler's model output.

    Args:
        place: Where the latents of the samples are in the denoiser's input.
        repeats: How often the samples are in the model output: 2 where a pipeline steps both halves (DiT).
        scale: s, which multiplies second half minus first, of a shape that goes with an estimate; None for no guidance.
        dim: Dimension in which an estimate has more than the scheduler gets; None for none.
        size: How much of it the scheduler gets.
    """

    place: Place
    repeats: int
    scale: Tensor | None
    dim: int | None = None
    size: int = 0

    @classmethod
    def find(cls, place: Place, given: Tensor, estimate: Tensor, output: Tensor) -> Combination | None:
        """Finds how a pipeline combined the halves of an estimate; the CPU waits for the device to look.

        Args:
            place: Where the latents were found in the denoiser's input.
            given: The denoiser's input.
            estimate: What the denoiser gave for it.
            output: What the scheduler got as `model_output`.

        Returns:
            None if it is none of the known ways.
        """
        shapes = list(zip(estimate.shape, output.shape, strict=False))
        others = [dim for dim, (here, there) in enumerate(shapes) if dim > 0 and here != there]
        if estimate.ndim != output.ndim or len(others) > 1 or any(here < there for here, there in shapes):
            return None
        dim = others[0] if others else None
        size = output.shape[dim] if dim is not None else 0
        for where, repeats in _ways(place, given):
            unscaled = cls(where, repeats, None, dim, size)
            halves = unscaled._halves(estimate)
            scales: list[Tensor | None] = [None] if len(halves) == 1 else [*_scales(halves, output, repeats)]
            for scale in scales:
                found = dataclasses.replace(unscaled, scale=scale)
                if not bool(found.differs(estimate, output)):
                    return found
        return None

    def differs(self, estimate: Tensor, output: Tensor) -> Tensor:
        """Whether a model output was made in another way, as a tensor on its device.

        Args:
            estimate: What the denoiser gave.
            output: The model output.
        """
        halves = self._halves(estimate)
        expected = torch.cat([self._guided(halves)] * self.repeats)
        if expected.shape != output.shape:
            return torch.ones((), dtype=torch.bool, device=output.device)
        size = halves[0].norm()
        if self.scale is not None:
            size = size + (self.scale * (halves[1] - halves[0])).norm()
        return ~((output.float() - expected.float()).norm() <= TOLERANCE * torch.finfo(estimate.dtype).eps * size)

    def __call__(self, halves: list[Tensor]) -> Tensor:
        """The model output for any states.

        Args:
            halves: Estimates of each half of the guidance batch, or of the one batch that there is, [M, ...].
        """
        return self._guided([self._used(half) for half in halves])

    def _halves(self, estimate: Tensor) -> list[Tensor]:
        return [self._used(half) for half in estimate.chunk(self.place.copies)]

    def _used(self, estimate: Tensor) -> Tensor:
        used = estimate if self.dim is None else estimate.narrow(self.dim, 0, self.size)
        return used.to(torch.promote_types(used.dtype, torch.float32))

    def _guided(self, halves: list[Tensor]) -> Tensor:
        return halves[0] if self.scale is None else halves[0] + self.scale * (halves[1] - halves[0])


def _ways(place: Place, given: Tensor) -> Iterator[tuple[Place, int]]:
    """Ways to read where the latents are: a pipeline that steps both halves alike has them there once or twice."""
    if place.copies <= 2:
        yield place, 1
    if place.copies == 1 and place.samples % 2 == 0:
        first, second = given.chunk(2)
        latents = place.part(first)
        if torch.equal(latents, place.part(second)):
            yield dataclasses.replace(place, samples=place.samples // 2, copies=2), 2


def _scales(halves: list[Tensor], output: Tensor, repeats: int) -> Iterator[Tensor]:
    """The s that fit best: one number, then one for each frame."""
    change = (halves[1] - halves[0]).double()
    wanted = output.chunk(repeats)[0].double()
    if wanted.shape != change.shape:
        return
    wanted = wanted - halves[0]
    over_all = tuple(range(change.ndim))
    for over in (over_all, tuple(dim for dim in over_all if dim != 1)):
        squares = change.square().sum(over, keepdim=True)
        # halves that are equal leave s open, and nothing depends on it
        scale = torch.where(squares > 0, (wanted * change).sum(over, keepdim=True) / squares, 0.0)
        yield scale.to(halves[0].dtype)
