"""Steps over any timesteps are those of diffusers' schedulers, where these can take them, and lead to the same data."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from asyncdiff_pl.sampling.respaced import RespacedScheduler, pick_timesteps

PICKED = {
    (5, 9, "linear"): [0, 2, 4, 6, 8],
    (4, 9, "linear"): [0, 3, 5, 8],
    # squares of 0, 1, 2, 3
    (4, 10, "quadratic"): [0, 1, 4, 9],
    # squares of multiples of 0.6 are 0, 0.36, 1.44, 3.24, 5.76, 9: the second would be 0 again
    (6, 10, "quadratic"): [0, 1, 2, 3, 6, 9],
    (1, 10, "quadratic"): [9],
}


@pytest.mark.parametrize(("arguments", "expected"), PICKED.items())
def test_picked_timesteps(arguments, expected):
    assert pick_timesteps(*arguments) == expected


@pytest.mark.parametrize("skip", ["linear", "quadratic"])
def test_any_number_of_timesteps_without_one_twice(skip):
    for number in range(2, 101):
        picked = pick_timesteps(number, 100, skip)
        assert (len(picked), picked[0], picked[-1]) == (number, 0, 99)
        assert all(a < b for a, b in itertools.pairwise(picked))
    with pytest.raises(ValueError, match="101 steps cannot be picked out of 100 timesteps; give 1 to 100"):
        pick_timesteps(101, 100, skip)


def run(scheduler, outputs, noises):
    """The states after all steps, where the network gives `outputs`."""
    state, states = torch.linspace(-2, 2, 12).view(1, 3, 2, 2), []
    for timestep, output, noise in zip(scheduler.timesteps, outputs, noises, strict=True):
        state = scheduler.step(output, timestep, state, noise).prev_sample
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_that_of_diffusers(prediction_type, eta):
    theirs = DDIMScheduler(num_train_timesteps=20, prediction_type=prediction_type)
    ours = RespacedScheduler.like(theirs, eta=eta)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    outputs, noises = torch.randn(2, 20, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    state, expected = torch.linspace(-2, 2, 12).view(1, 3, 2, 2), []
    for timestep, output, noise in zip(theirs.timesteps, outputs, noises, strict=True):
        # where the estimate of the clean data is limited, that of the noise follows
        state = theirs.step(output, timestep, state, eta, True, variance_noise=noise).prev_sample
        expected.append(state)
    torch.testing.assert_close(run(ours, outputs, noises), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("skip", ["linear", "quadratic"])
def test_ddpm_over_a_part_of_the_timesteps_is_that_of_diffusers(variance, skip, monkeypatch):
    theirs = DDPMScheduler(num_train_timesteps=100, variance_type=variance)
    ours = RespacedScheduler.like(theirs, sampler="ddpm", skip=skip)
    ours.set_timesteps(7)
    theirs.set_timesteps(timesteps=ours.timesteps.tolist())
    outputs, noises = torch.randn(2, 7, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    left = list(noises)
    name = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(name, lambda *_, **__: left.pop(0))
    state, expected = torch.linspace(-2, 2, 12).view(1, 3, 2, 2), []
    for timestep, output in zip(theirs.timesteps, outputs, strict=True):
        state = theirs.step(output, timestep, state).prev_sample
        expected.append(state)
    assert len(left) == 1  # the last step adds none
    torch.testing.assert_close(run(ours, outputs, noises), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variance", "number", "expected"),
    [("fixed_small", 100, 0.0), ("fixed_large", 100, 0.04478), ("fixed_large", 1000, 0.0092)],
)
def test_noise_that_the_network_is_not_told_of(variance, number, expected):
    scheduler = RespacedScheduler(sampler="ddpm", variance_type=variance)
    scheduler.set_timesteps(number)
    assert scheduler.hidden_noise == pytest.approx(expected, abs=1e-4)


def test_noise_that_the_network_is_not_told_of_in_two_steps():
    scheduler = RespacedScheduler(sampler="ddpm", variance_type="fixed_large")
    scheduler.set_timesteps(2)
    level, following = scheduler.alphas_cumprod[[999, 0]].tolist()
    forward = 1 - level / following
    # by hand: the noise that is added, less what the posterior has
    expected = (forward - forward * (1 - following) / (1 - level)) ** 0.5
    assert scheduler.hidden_noise == pytest.approx(expected, abs=1e-4)


def test_a_learned_variance_over_a_part_of_the_timesteps_is_that_of_diffusers(monkeypatch):
    theirs = DDPMScheduler(num_train_timesteps=100, variance_type="learned_range")
    ours = RespacedScheduler.like(theirs, sampler="ddpm")
    ours.set_timesteps(7)
    theirs.set_timesteps(timesteps=ours.timesteps.tolist())
    generator = torch.Generator().manual_seed(0)
    outputs, noises = torch.randn(7, 1, 6, 2, 2, generator=generator), torch.randn(7, 1, 3, 2, 2, generator=generator)
    left = list(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: left.pop(0))
    state, expected = torch.linspace(-2, 2, 12).view(1, 3, 2, 2), []
    for timestep, output in zip(theirs.timesteps, outputs, strict=True):
        # diffusers cuts its noise to the prediction's channels
        state = theirs.step(output, timestep, state).prev_sample
        expected.append(state)
    torch.testing.assert_close(run(ours, outputs, noises), torch.stack(expected), atol=1e-4, rtol=1e-4)
    # the other samplers take the prediction alone
    for settings in ({"sampler": "ddim"}, {"sampler": "ddpm", "variance_type": "fixed_small"}):
        scheduler = RespacedScheduler.like(theirs, **settings)
        scheduler.set_timesteps(7)
        assert torch.equal(run(scheduler, outputs, noises), run(scheduler, outputs[:, :, :3], noises))
    with pytest.raises(ValueError, match="the network gives no variances; set it to fixed_small or fixed_large"):
        run(ours, outputs[:, :, :3], noises)


@pytest.mark.parametrize(("number", "skip"), [(1, "linear"), (3, "quadratic"), (333, "linear"), (1000, "linear")])
def test_ddim_with_the_true_noise_ends_at_the_data(number, skip):
    scheduler = RespacedScheduler(skip=skip)
    scheduler.set_timesteps(number)
    clean = torch.linspace(-1, 1, 12).view(1, 3, 2, 2).double()
    level = scheduler.alphas_cumprod[999]
    state = level.sqrt() * clean + (1 - level).sqrt() * torch.randn(1, 3, 2, 2, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        level = scheduler.alphas_cumprod[timestep]
        state = scheduler.step((state - level.sqrt() * clean) / (1 - level).sqrt(), timestep, state).prev_sample
    torch.testing.assert_close(state, clean, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"eta": 1.5}, "eta is 1.5 and the sampler ddim; give ddim one from 0 to 1"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta is 0.5 and the sampler ddpm; .* and ddpm none"),
        ({"variance_type": "learned", "sampler": "ddpm"}, "variance_type is learned; ddpm takes fixed_small"),
    ],
)
def test_bad_settings(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        RespacedScheduler(**arguments)
