"""How much noise each timestep adds: the variances β_t that DDPM's forward process is made of.

Linear: Ho et al. (2020), "Denoising Diffusion Probabilistic Models", section 4; quadratic, whose square roots are even:
Song et al. (2021), "Denoising Diffusion Implicit Models", appendix D.3; cosine: Nichol and Dhariwal (2021), "Improved
Denoising Diffusion Probabilistic Models", equation 17; warm-up, which rises linearly and then stays: DDPM's own code.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "quadratic", "cosine", "warmup"]
"""How β rises."""

COSINE_OFFSET = 0.008
"""What keeps the cosine schedule's first β from being too small."""

GREATEST_BETA = 0.999
"""Where the cosine schedule's β is cut off: at its end ᾱ would be 0."""


def betas(
    schedule: BetaSchedule,
    steps: int = 1000,
    start: float = 1e-4,
    end: float = 0.02,
    warm_up_share: float = 0.1,
) -> Tensor:
    """The variances β_t of a schedule.

    Args:
        schedule: `linear`, `quadratic`, `cosine` or `warmup`.
        steps: Number of timesteps T.
        start: β of the first timestep; the cosine schedule has its own.
        end: β of the last timestep; the cosine schedule has its own.
        warm_up_share: Share of the timesteps over which `warmup` rises.

    Returns:
        [T], float64.

    Raises:
        ValueError: A number is out of range, or the schedule is not known.
    """
    if schedule not in get_args(BetaSchedule):
        raise ValueError(f"The noise schedule is {schedule}; take one of {', '.join(get_args(BetaSchedule))}.")
    if steps < 2:
        raise ValueError(f"The noise schedule has {steps} timesteps; give 2 or more, 1000 say.")
    if not 0 < start <= end < 1:
        raise ValueError(f"The noise schedule goes from {start} to {end}; give 0 < start <= end < 1.")
    if not 0 < warm_up_share <= 1:
        raise ValueError(f"The share of the warm-up is {warm_up_share}; give one above 0, up to 1.")
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "quadratic":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if schedule == "warmup":
        found = torch.full((steps,), end, dtype=torch.float64)
        rising = int(steps * warm_up_share)
        found[:rising] = torch.linspace(start, end, rising, dtype=torch.float64)
        return found
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    levels = torch.cos((times + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - levels[1:] / levels[:-1]).clamp(max=GREATEST_BETA)


def signal_levels(variances: Tensor) -> Tensor:
    """ᾱ_t = ∏ (1 − β_s) over s ≤ t: the share of the clean data's variance that is left, of β's shape [T]."""
    return (1 - variances).cumprod(0)
