"""Samplers of timesteps and weights of losses do not make the CPU wait for the GPU in any step."""

import pytest
import torch

from asyncdiff_pl.training.loss_weights import LearnedUncertainty, MinSNRWeight
from asyncdiff_pl.training.timesteps import AdaptiveTimesteps, BetaPolicy, LossSecondMoment, SpeeD, UniformTimesteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.mark.parametrize("kind", [UniformTimesteps, SpeeD, LossSecondMoment, AdaptiveTimesteps, BetaPolicy])
@pytest.mark.parametrize("weight", [MinSNRWeight, LearnedUncertainty])
def test_no_step_waits(kind, weight):
    sampler, weight = kind(), weight()
    sampler.build(ALPHAS_CUMPROD)
    weight.build(ALPHAS_CUMPROD, "epsilon")
    sampler.cuda()
    weight.cuda()
    clean = torch.rand(32, 3, 32, 32, device="cuda")

    def step():
        timesteps, shares = sampler.draw(clean)
        losses = 0.1 + 0.01 * clean.mean((1, 2, 3))
        (shares * weight.weight(losses, timesteps)).mean()
        sampler.update(timesteps, losses)

    # what is made at the first call may wait
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
