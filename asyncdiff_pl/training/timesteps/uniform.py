"""Timesteps drawn evenly: what DDPM does, and what all others are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.training.continuous_noise import spread_uniform
from asyncdiff_pl.training.timesteps.base import TimestepSampler


class UniformTimesteps(TimestepSampler):
    """Draws timesteps evenly (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1).

    Args:
        spread: Cover all timesteps evenly in each batch, one of each B-th part, in place of independent draws; the
            gradient's expectation is the same and its noise smaller.
    """

    def __init__(self, spread: bool = False) -> None:
        super().__init__()
        self.spread = spread

    @override
    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        batch, device = len(clean), clean.device
        if self.spread:
            timesteps = (spread_uniform(batch, device) * self.number).long().clamp(max=self.number - 1)
        else:
            timesteps = torch.randint(self.number, (batch,), device=device)
        return timesteps, torch.ones(batch, device=device)
