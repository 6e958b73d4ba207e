"""Timesteps drawn by the size of their losses, and weighted so that the mean loss stays what it is.

After Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", section 3.3 and equation 18.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType
from asyncdiff_pl.training.timesteps.base import TimestepSampler


class LossSecondMoment(TimestepSampler):
    """Draws timesteps by p ∝ √(E L²) of their last losses, with weights 1/(T p) that undo it in expectation.

    Until each timestep has its losses they are drawn evenly.

    Args:
        history: Losses that are kept of each timestep.
        even_share: Share of draws, 0 to 1, that is even over all timesteps, so that each has some probability.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, history: int = 10, even_share: float = 0.001) -> None:
        super().__init__()
        if history < 1 or not 0 < even_share <= 1:
            raise ValueError(
                f"history is {history} and even_share {even_share}; give 1 loss or more, and a share above 0 up to 1."
            )
        self.history = history
        self.even_share = even_share

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        super().build(alphas_cumprod, prediction_type)
        # the last row takes what a batch has too much of
        self.register_buffer("losses", torch.zeros(self.number + 1, self.history))
        self.register_buffer("counts", torch.zeros(self.number, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Probabilities p [T] of the next draw, float32."""
        size = self.losses[: self.number].square().mean(1).sqrt()
        # losses that are all 0 tell nothing
        is_ready = (self.counts >= self.history).all() & (size.sum() > 0)
        share = torch.where(is_ready, size / size.sum(), 1 / self.number)
        return (1 - self.even_share) * share + self.even_share / self.number

    @override
    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities()
        timesteps = torch.multinomial(probabilities, len(clean), replacement=True)
        return timesteps, 1 / (self.number * probabilities[timesteps])

    @override
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        timesteps, losses = self.gather(timesteps), self.gather(losses.float())
        timesteps, order = timesteps.sort(stable=True)
        # a timestep that comes several times fills as many places, in the order of the batch
        first = torch.searchsorted(timesteps, timesteps)
        last = torch.searchsorted(timesteps, timesteps, right=True)
        position = torch.arange(len(timesteps), device=timesteps.device)
        place = (self.counts[timesteps] + position - first) % self.history
        row = torch.where(position >= last - self.history, timesteps, self.number)
        self.losses[row, place] = losses[order]
        self.counts.index_add_(0, timesteps, torch.ones_like(timesteps))
