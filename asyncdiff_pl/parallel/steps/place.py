"""Where a denoiser's input has the latents: found in a call, so that other latents can be put in their place.

A pipeline scales its latents, repeats them for guidance, and some put further channels beside them (Stable Video
Diffusion's picture, inpainting's mask). What it did is seen when the latents are looked for in the input, and it is
looked again in each round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TOLERANCE = 4
"""Roundings of the input's number format that latents may differ by: some pipelines scale before they round."""


@dataclass(frozen=True)
class Place:
    """Where scaled latents are in a denoiser's input.

    Args:
        samples: How many of the latents' samples are in it; DiT's pipeline steps both halves of its guidance batch, and
            goes on with the first one.
        copies: How often they are there, behind one another in dimension 0.
        dim: Dimension in which there is more beside them; None where they are all.
        start: Where they begin in that dimension.
        size: How long they are in it.
    """

    samples: int
    copies: int
    dim: int | None = None
    start: int = 0
    size: int = 0

    @classmethod
    def find(cls, given: torch.Tensor, scaled: torch.Tensor) -> Place | None:
        """Looks for latents in a denoiser's input; the CPU waits for the device to look.

        Args:
            given: The input.
            scaled: The latents as the scheduler scales them.
        """
        return next((place for place in cls._possible(given, scaled) if not place.differs(given, scaled)), None)

    @classmethod
    def _possible(cls, given: torch.Tensor, scaled: torch.Tensor) -> Iterator[Place]:
        """Places that the shapes allow."""
        if given.ndim != scaled.ndim:
            return
        pairs = list(zip(given.shape, scaled.shape, strict=True))
        others = [dim for dim, (here, there) in enumerate(pairs) if dim > 0 and here != there]
        batch, most = pairs[0]
        for samples in (most, most // 2) if most % 2 == 0 else (most,):
            if batch % samples:
                continue
            if not others:
                yield cls(samples, batch // samples)
            elif len(others) == 1 and pairs[others[0]][0] > pairs[others[0]][1]:
                here, there = pairs[others[0]]
                for start in (0, here - there):
                    yield cls(samples, batch // samples, others[0], start, there)

    def differs(self, given: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """Whether other latents are there, as a tensor on their device.

        Args:
            given: The input.
            scaled: The latents.
        """
        expected = self._repeated(scaled, given).float()
        distance = (self.part(given).float() - expected).norm()
        # what is not a number differs from everything
        return ~(distance <= TOLERANCE * torch.finfo(given.dtype).eps * expected.norm())

    def filled(self, given: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """The input with other latents, in memory laid out like it.

        Args:
            given: The input.
            scaled: The latents.
        """
        found = given.clone()
        self.part(found).copy_(self._repeated(scaled, given))
        return found

    def part(self, given: torch.Tensor) -> torch.Tensor:
        """What of an input is latents, in its memory."""
        return given if self.dim is None else given.narrow(self.dim, self.start, self.size)

    def _repeated(self, scaled: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return torch.cat([scaled[: self.samples]] * self.copies).to(given.dtype)


class Answer:
    """A yes or no that a device finds out, to be read later: nobody waits for what was launched after it.

    Args:
        answer: A tensor with one truth value.
    """

    def __init__(self, answer: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._answer = answer
        if answer.device.type == "cuda":
            self._answer = torch.empty_like(answer, device="cpu", pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """The answer; waits until the device has come to it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)
