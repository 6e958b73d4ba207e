"""Timestep samplers against tables worked out by hand."""

import pytest
import torch

from asyncdiff_pl.training.timesteps import UniformTimesteps
from asyncdiff_pl.training.timesteps.base import draw_from

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
"""β of DDPM."""


def built(sampler, alphas_cumprod=None):
    """A sampler that knows its noise levels: DDPM's, if none are given."""
    sampler.build((1 - LINEAR).cumprod(0).float() if alphas_cumprod is None else alphas_cumprod)
    return sampler


def pictures(number):
    return torch.zeros(number, 3, 2, 2)


def test_uniform_timesteps_cover_all_evenly():
    sampler = built(UniformTimesteps(spread=True), torch.linspace(0.9, 0.1, 10))
    timesteps, weights = sampler.draw(pictures(100))
    assert timesteps.bincount().tolist() == [10] * 10
    assert weights.tolist() == [1.0] * 100
    timesteps, _ = built(UniformTimesteps(), torch.linspace(0.9, 0.1, 10)).draw(pictures(20_000))
    assert timesteps.bincount() / 20_000 == pytest.approx([0.1] * 10, abs=0.015)


@pytest.mark.parametrize("spread", [False, True])
def test_draws_have_their_probabilities(spread):
    drawn = draw_from(torch.tensor([0.5, 0.0, 0.25, 0.25]), 4000, spread)
    expected = [0.5, 0, 0.25, 0.25]
    assert (drawn.bincount(minlength=4) / 4000).tolist() == pytest.approx(expected, abs=1e-3 if spread else 0.04)
