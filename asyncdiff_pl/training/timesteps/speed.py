"""SpeeD: fewer timesteps where the noise hardly changes any more, and each timestep together with its opposite.

After Wang et al. (2024), "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training",
with the released code's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType
from asyncdiff_pl.training.timesteps.base import TimestepSampler

SLOW = 1e-4
"""A change of √(1 − ᾱ) a timestep below which the noise hardly changes."""

STEEPNESS = 1e6
"""How sharply probabilities fall at that change."""

BASE = 1.5
"""What is added to the hyperbolic tangent: 2.5 against 0.5 makes timesteps before the fall five times as likely."""


class SpeeD(TimestepSampler):
    """Draws timesteps before τ five times as often as those after it, half of a batch opposite to the other half.

    With g the change of √(1 − ᾱ) a timestep, p ∝ tanh(10⁶ (g − 10⁻⁴)) + 1.5 and τ is one more than the first timestep
    with g < 10⁻⁴ (642 for DDPM's linear β). Half of a batch is drawn from p; the other half mirrors it: τ − t where
    t < τ, else t − τ.

    Args:
        weigh: Multiply losses by 1/(1 + SNR) = 1 − ᾱ, as the released code does; false is the sampler alone.
    """

    probabilities: Tensor
    noise: Tensor

    def __init__(self, weigh: bool = True) -> None:
        super().__init__()
        self.weigh = weigh
        self.turn = 0
        """τ, known from `build` on."""

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        super().build(alphas_cumprod, prediction_type)
        noise = 1 - alphas_cumprod.double()
        (change,) = torch.gradient(noise.sqrt())
        slow = (change < SLOW).nonzero()
        if not len(slow):
            raise ValueError(
                f"√(1 − ᾱ) changes by {change.min():.2g} or more at each of the {self.number} timesteps, and SpeeD "
                f"needs some where it changes by less than {SLOW:g}; take more timesteps or another sampler."
            )
        self.turn = int(slow[0]) + 1
        probabilities = torch.tanh(STEEPNESS * (change - SLOW)) + BASE
        self.register_buffer("probabilities", (probabilities / probabilities.sum()).float(), persistent=False)
        self.register_buffer("noise", noise.float(), persistent=False)

    @override
    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(clean)
        drawn = torch.multinomial(self.probabilities, batch // 2 + 1, replacement=True)
        mirrored = torch.where(drawn < self.turn, self.turn - drawn, drawn - self.turn)
        timesteps = torch.cat([drawn, mirrored])[:batch].clamp(max=self.number - 1)
        return timesteps, self.noise[timesteps] if self.weigh else torch.ones_like(self.noise[timesteps])
