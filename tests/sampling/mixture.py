"""A Gaussian mixture whose noise estimate is known exactly, on which the solvers' iterations are counted.

- Data: 32 components of equal weight in 4 × 32 × 32 dimensions. Each mean is drawn from the standard normal
  distribution by `torch.Generator().manual_seed(seed)`, float64, seed 0; all components have the covariance 0.2² I.
- Noise: DDIM's own schedule as diffusers has it: 1000 timesteps, β linear from 1e-4 to 0.02, spacing "leading",
  `set_alpha_to_one`, no clipping. Everything is float64.
- Samples: sample b starts from noise drawn by `torch.Generator().manual_seed(100 + b)`, and at η = 1 the same generator
  gives the steps' noises (`draw_noises`).
- An iteration is one evaluation of the noise estimate on the sample's window of states, the last and the first one
  counted: N iterations of one state each would be sequential sampling. The tolerance is 1e-3.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from asyncdiff_pl.sampling import StepCoefficients, draw_noises, read_coefficients

SHAPE = (4, 32, 32)
COMPONENTS = 32
DEVIATION = 0.2
SEED = 0


class Mixture:
    """Its noise estimate, √(1 − ᾱ) (x − √ᾱ Σ_k w_k μ_k) / v with v = ᾱ σ² + 1 − ᾱ and the posterior's weights w."""

    def __init__(
        self, alphas_cumprod: Tensor, shape: tuple[int, ...] = SHAPE, seed: int = SEED, deviation: float = DEVIATION
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(COMPONENTS, *shape, generator=generator, dtype=torch.float64).flatten(1)
        self.deviation = deviation
        self.alphas_cumprod = alphas_cumprod.double()

    def __call__(self, states: Tensor, timesteps: Tensor, samples: list[int], steps: list[int]) -> Tensor:
        flat = states.flatten(1).double()
        levels = self.alphas_cumprod[timesteps][:, None]
        variances = levels * self.deviation**2 + 1 - levels
        distances = levels.sqrt() * flat @ self.means.T - levels / 2 * self.means.square().sum(1)
        centres = (distances / variances).softmax(1) @ self.means
        estimates = (1 - levels).sqrt() * (flat - levels.sqrt() * centres) / variances
        return estimates.view_as(states).to(states.dtype)


def problem(
    number: int,
    eta: float,
    batch: int = 2,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float64,
    seed: int = SEED,
    deviation: float = DEVIATION,
) -> tuple[Mixture, Tensor, StepCoefficients, Tensor]:
    """The estimate, the noise to begin with, the N steps, and their noises."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(number)
    generators = [torch.Generator().manual_seed(100 + index) for index in range(batch)]
    latents = torch.stack([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])
    noises = draw_noises(generators, number, shape, like=latents)
    return Mixture(scheduler.alphas_cumprod, shape, seed, deviation), latents, read_coefficients(scheduler, eta), noises
