"""What training calls noise and targets is what diffusers' schedulers take them for."""

import pytest
import torch
from diffusers import DDIMScheduler

from asyncdiff_pl.models.training.components import read_scheduler
from asyncdiff_pl.training.continuous_noise import LogNormalSigmas, v_preconditioning, v_target
from asyncdiff_pl.training.discrete_noise import DiscreteNoise


def test_continuous_noise_is_that_of_the_video_scheduler():
    scheduler = read_scheduler("tiny-svd")
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 4, 3, 3)
    for sigma, time in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        noisy = clean + sigma * noise
        around = v_preconditioning(sigma)
        torch.testing.assert_close(around.c_in * noisy, scheduler.scale_model_input(noisy, time), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(around.c_noise, time, atol=1e-5, rtol=1e-5)
        target = v_target(clean, noise, sigma)
        found = scheduler.step(target, time, noisy).pred_original_sample
        torch.testing.assert_close(found, clean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(around.c_skip * noisy + around.c_out * target, clean, atol=1e-3, rtol=1e-3)


def test_noise_levels():
    torch.manual_seed(0)
    levels = LogNormalSigmas(0.5, 1.6, minimum=0.002, maximum=700).draw(4000, torch.device("cpu")).log()
    assert levels.mean() == pytest.approx(0.5, abs=0.01)
    assert levels.std() == pytest.approx(1.6, abs=0.02)
    even = LogNormalSigmas(0.5, 1.6, even_share=1.0).draw(4000, torch.device("cpu")).log()
    share = (even > torch.tensor(100.0).log()).float().mean()
    assert share == pytest.approx(0.1524, abs=0.005)  # ln 7 / ln 350,000


@pytest.mark.parametrize(("std", "share"), [(0.0, 0.1), (1.0, 1.5)])
def test_noise_levels_that_cannot_be(std, share):
    with pytest.raises(ValueError, match="give one above 0, and a share from 0 to 1"):
        LogNormalSigmas(0.0, std, share)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_discrete_noise_is_that_of_ddim(kind):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    noise = DiscreteNoise(scheduler.alphas_cumprod, kind)
    clean, drawn = torch.randn(2, 3, 4, 5, 5)
    timesteps = torch.tensor([0, 400, 990])
    noisy = noise.add(clean, drawn, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, drawn, timesteps))
    target = noise.target(clean, drawn, timesteps)
    scheduler.set_timesteps(100)
    for i, time in enumerate(timesteps):
        found = scheduler.step(target[i], time, noisy[i]).pred_original_sample
        torch.testing.assert_close(found, clean[i], atol=1e-3, rtol=1e-3)


def test_an_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type is flow; training knows epsilon"):
        DiscreteNoise(torch.ones(3), "flow")
