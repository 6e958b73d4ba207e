"""Timesteps drawn by what training shows of them: where it still makes progress, and where gradients are noisy.

**What is to be learned.** A batch is of little use at noise levels where the loss no longer falls: near the clean data
most of the error cannot be predicted away, and yet it makes most of the gradient's noise. The best weight of a noisy
estimate is the share of signal in it (Wiener's shrinkage). So a level counts with h = 1 − ρ + ρ r / (r + m / 4), where
r = max(0, ln(slow mean of losses / fast mean of losses)) is the relative progress that is measured there, and m its
mean over all timesteps: usual progress counts nearly in full, none hardly.

**How it is drawn.** The variance of the mean of h L, estimated from B samples, is least where levels are drawn by their
root mean square gradient. A sample's squared gradient grows as its loss, so p ∝ h √L, mixed with an even share; and
weights w = (h / (T p))^κ: for κ = 1 the gradient's expectation is that of the mean of h L, whatever p is. At high
noise, where half of all timesteps have a hundredth of the loss, this saves samples, and the rest of the batch does what
a larger one would. A batch takes one timestep of each of B parts of equal probability, so that how often each level
comes is no source of noise.

**What it costs.** No pass of the network: the losses are those of training. Sums over two dozen levels are updated
each step, in windows that grow with the run, as progress becomes slower and harder to see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType
from asyncdiff_pl.training.timesteps.base import TimestepSampler, draw_from

FAST, SLOW = (50.0, 0.03), (150.0, 0.15)
"""Windows of the two means: so many steps, and this share of all steps so far."""

USUAL = 0.25
"""Share of the mean progress at which a level counts half."""

LEAST_PROGRESS = 1e-3
"""Relative progress that cannot be told from none."""


class AdaptiveTimesteps(TimestepSampler):
    """Draws timesteps by measured progress and gradient noise, evenly spread over each batch; this package's own.

    Args:
        follow: How far levels count by their progress, ρ from 0 (all the same) to 1 (none without progress).
        correction: How far weights undo the density of draws, κ from 0 (draws alone decide) to 1 (exactly).
        even_share: Share of draws, above 0 up to 1, that is even over all timesteps; it bounds weights.
        levels: Number of noise levels that losses are measured at.
    """

    level: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(
        self, follow: float = 0.8, correction: float = 1.0, even_share: float = 0.25, levels: int = 24
    ) -> None:
        super().__init__()
        if not (0 <= follow <= 1 and 0 <= correction <= 1 and 0 < even_share <= 1 and levels >= 2):
            raise ValueError(
                f"follow is {follow}, correction {correction}, even_share {even_share} and levels {levels}; give "
                "shares from 0 to 1, even_share above 0, and 2 levels or more."
            )
        self.follow = follow
        self.correction = correction
        self.even_share = even_share
        self.levels = levels

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        super().build(alphas_cumprod, prediction_type)
        # halfway between equal parts of time and of the logarithm of SNR: loss changes fast with the first timesteps
        log_snr = torch.logit(alphas_cumprod.double(), eps=1e-9)
        covered = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1])
        place = (covered + torch.arange(self.number) / self.number) / 2
        _, level = (place * self.levels).long().clamp(0, self.levels - 1).unique(return_inverse=True)
        self.register_buffer("level", level, persistent=False)
        # [fast and slow, number and sum of losses, levels]: as if each level had one loss of 1, that of no knowledge
        self.register_buffer("sums", torch.ones(2, 2, int(level.max()) + 1))
        self.register_buffer("steps", torch.zeros(()))

    def shares(self) -> tuple[Tensor, Tensor]:
        """How much each timestep counts, h [T] of mean 1; and p [T] of the next draw."""
        fast, slow = self.sums[:, 1] / self.sums[:, 0]
        progress = _smooth((slow / fast).log()).clamp(min=0)[self.level] + LEAST_PROGRESS
        counts = 1 - self.follow + self.follow * progress / (progress + USUAL * progress.mean())
        counts = counts / counts.mean()
        density = counts * fast.sqrt()[self.level]
        return counts, (1 - self.even_share) * density / density.sum() + self.even_share / self.number

    @override
    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        counts, probabilities = self.shares()
        timesteps = draw_from(probabilities, len(clean), spread=True)
        return timesteps, (counts / (self.number * probabilities))[timesteps] ** self.correction

    @override
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        found = torch.zeros_like(self.sums[0])
        found.index_add_(1, self.level[timesteps], torch.stack([torch.ones_like(losses), losses]).float())
        found = self.reduce(found)
        self.steps += 1
        for sums, (start, share) in zip(self.sums, (FAST, SLOW), strict=True):
            sums.mul_(1 - 1 / (start + share * self.steps)).add_(found)


def _smooth(values: Tensor) -> Tensor:
    """Means [K] of each value (half) and its two neighbours (a quarter each); the ends are their own neighbours."""
    padded = torch.cat([values[:1], values, values[-1:]])
    return padded[:-2] / 4 + values / 2 + padded[2:] / 4
