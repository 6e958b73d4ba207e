"""Noise of continuous strength, as Stable Video Diffusion has it: EDM's preconditioning for v-prediction.

After Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", section 5 and table 1,
with data of unit variance. A network F is trained; the denoiser is D(x; σ) = c_skip x + c_out F(c_in x; c_noise).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Preconditioning(NamedTuple):
    """What surrounds the network at some noise levels, each of σ's shape; the pipeline's scheduler has the same."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class LogNormalSigmas:
    """Draws noise levels: ln σ is normal, but for a share that is spread evenly over the whole range.

    Sampling starts at noise levels that the normal distribution hardly ever gives; the even share trains them too.

    Args:
        mean: Mean of ln σ.
        std: Standard deviation of ln σ.
        even_share: Share of levels, 0 to 1, whose ln σ is uniform from `minimum` to `maximum`.
        minimum: Least σ.
        maximum: Greatest σ.
    """

    def __init__(
        self, mean: float, std: float, even_share: float = 0.0, minimum: float = 0.002, maximum: float = 700.0
    ) -> None:
        if std <= 0 or not 0 <= even_share <= 1:
            raise ValueError(
                f"Noise levels have standard deviation {std} and an even share of {even_share}; give one above 0, and "
                "a share from 0 to 1."
            )
        self.mean, self.std, self.even_share = mean, std, even_share
        self.low, self.high = math.log(minimum), math.log(maximum)

    def at(self, uniform: Tensor, is_even: Tensor) -> Tensor:
        """Noise levels at some quantiles.

        Args:
            uniform: [B], from 0 to 1: quantiles.
            is_even: [B], bool: which are of the even share.

        Returns:
            σ [B].
        """
        normal = self.mean + self.std * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
        even = self.low + (self.high - self.low) * uniform
        return torch.where(is_even, even, normal.clamp(self.low, self.high)).exp()

    def draw(self, number: int, device: torch.device) -> Tensor:
        """Draws σ [number]; a batch covers the distribution evenly, which makes the loss less noisy."""
        is_even = torch.rand(number, device=device) < self.even_share
        return self.at(spread_uniform(number, device), is_even)


def spread_uniform(number: int, device: torch.device) -> Tensor:
    """Uniform numbers [number], one from each of `number` equal parts of (0, 1), in order."""
    return (torch.arange(number, device=device) + torch.rand(number, device=device)) / number


def v_preconditioning(sigma: Tensor) -> Preconditioning:
    """The preconditioning of v-prediction.

    Args:
        sigma: Noise levels σ of any shape.
    """
    total = sigma**2 + 1
    return Preconditioning(1 / total, -sigma / total.sqrt(), 1 / total.sqrt(), 0.25 * sigma.log())


def v_target(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the network should give: (noise − σ clean) / √(σ² + 1), so that D is the clean data.

    The plain mean square error of it is the error of D weighted by 1 / c_out² = 1 + 1/σ².

    Args:
        clean: Clean data of unit variance.
        noise: Standard normal noise of the same shape.
        sigma: Noise levels, of a shape that fits.
    """
    return (noise - sigma * clean) / (sigma**2 + 1).sqrt()
