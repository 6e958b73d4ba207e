"""The terms of the variational bound against torch.distributions, and which loss trains what."""

import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch.distributions import Normal, kl_divergence

from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.training.discrete_noise import DiscreteNoise
from asyncdiff_pl.training.loss_weights import MinSNRWeight
from asyncdiff_pl.training.noise_schedule import betas, signal_levels
from asyncdiff_pl.training.variational_bound import VariationalBound

TINY = {"size": 8, "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (), "num_timesteps": 20}
TINY |= {"sample_steps": 4, "num_samples": 4, "dropout": 0.0}
KINDS = ("epsilon", "v_prediction", "sample")
BETAS = betas("linear", 20, 0.01, 0.2)
PICTURES = (torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()


def step_of(clean, state, timestep):
    """The posterior's mean, β̃ and β (at the first timestep those of the next one and its own)."""
    level = signal_levels(BETAS)
    before = level[timestep - 1] if timestep else torch.ones((), dtype=torch.float64)
    beta = BETAS[timestep]
    mean = before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * state
    place = max(1, timestep)
    return mean / (1 - level[timestep]), (1 - level[place - 1]) / (1 - level[place]) * BETAS[place], beta


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_divergences_of_the_steps_and_a_likelihood(kind, variance):
    noise = DiscreteNoise(signal_levels(BETAS), kind)
    bound = VariationalBound(BETAS, kind, variance)
    draw = torch.randn(3, *PICTURES.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 7, 13, 19, 0])
    states = noise.add(PICTURES, draw[0], timesteps)
    predictions = noise.target(PICTURES, draw[0], timesteps) + 0.1 * draw[1]
    shares = draw[2].tanh() if variance == "learned_range" else None
    errors = (predictions - noise.target(PICTURES, draw[0], timesteps)).float()
    found = bound(PICTURES.float(), errors, timesteps, None if shares is None else shares.float())
    for row, timestep in enumerate(timesteps.tolist()):
        level, state, prediction = signal_levels(BETAS)[timestep], states[row], predictions[row]
        clean = {
            "epsilon": (state - (1 - level).sqrt() * prediction) / level.sqrt(),
            "v_prediction": level.sqrt() * state - (1 - level).sqrt() * prediction,
            "sample": prediction,
        }[kind]
        mean, small, large = step_of(clean, state, timestep)
        if variance == "learned_range":
            share = (shares[row] + 1) / 2
            own = (share * large.log() + (1 - share) * small.log()).exp()
        else:
            own = small if variance == "fixed_small" or timestep == 0 else large
        model = Normal(mean, own.sqrt().expand_as(mean))
        if timestep:
            target = step_of(PICTURES[row], state, timestep)[0]
            expected = kl_divergence(Normal(target, small.sqrt().expand_as(target)), model)
        else:
            above = torch.where(PICTURES[row] > 0.999, 1.0, model.cdf(PICTURES[row] + 1 / 255))
            below = torch.where(PICTURES[row] < -0.999, 0.0, model.cdf(PICTURES[row] - 1 / 255))
            expected = -(above - below).clamp(min=1e-12).log()
        assert found[row].item() == pytest.approx(expected.mean().item() / math.log(2), rel=1e-3, abs=1e-6)


def test_likelihoods_of_all_values_make_one():
    bound = VariationalBound(BETAS, "sample", "fixed_small")
    values = (torch.arange(256) / 127.5 - 1).view(-1, 1, 1, 1)
    bits = bound(values, 0.3 - values, torch.zeros(256, dtype=torch.long))
    assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-3)


def build(**settings):
    torch.manual_seed(0)
    module = DDPM(**TINY | settings)
    torch.nn.init.normal_(module.network.conv_out.weight, std=0.1)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_trains_the_mean_by_the_error_and_the_variance_by_the_bound(kind):
    gradients = {}
    for loss, weight, part in (
        *(("hybrid", 1e-3, "loss"), ("hybrid", 1.0, "loss")),
        *(("kl", 1e-3, "loss"), ("kl", 1e-3, "mse")),
    ):
        module = build(prediction_type=kind, variance="learned_range", loss=loss, bound_weight=weight)
        torch.manual_seed(1)
        module.loss({"frames": PICTURES.float()[:, None] / 2 + 0.5})[part].backward()
        gradients[loss, weight, part] = module.network.conv_out.bias.grad
    small, large, whole, plain = gradients.values()
    # what the bound says of the mean does not count, however much it weighs, and that of the variance as it weighs
    torch.testing.assert_close(small[:3], plain[:3], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(large[:3], plain[:3], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(large[3:], 1000 * small[3:], atol=0, rtol=1e-3)
    # 20 timesteps: hybrid counts all of them
    torch.testing.assert_close(large[3:], 20 * whole[3:], atol=0, rtol=1e-3)
    assert not torch.allclose(whole[:3], plain[:3], rtol=0.01)


def test_a_learned_variance_is_trained_saved_and_sampled(tmp_path):
    module = build(variance="learned_range", loss="hybrid", bound_weight=0.1)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-2)
    batch = {"frames": PICTURES.float()[:, None] / 2 + 0.5, "index": torch.arange(6)}
    with torch.no_grad():
        before = module.validate(batch, 0)
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(batch)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        after = module.validate(batch, 0)
    assert after["loss"] < before["loss"]
    assert after["bits_per_dim"] < before["bits_per_dim"]
    module.export(tmp_path)
    theirs = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(theirs.scheduler, DDPMScheduler)
    assert (theirs.scheduler.config.variance_type, theirs.unet.config.out_channels) == ("learned_range", 6)
    theirs.set_progress_bar_config(disable=True)
    assert theirs(2, torch.Generator().manual_seed(0), num_inference_steps=4).images[1].size == (8, 8)
    own = UnconditionalPipeline.from_pretrained(tmp_path)
    own.set_progress_bar_config(disable=True)
    assert own([0, 1], 4, "pt").images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variance": "learned_range"}, "loss mse, which trains no variance; give loss hybrid or kl"),
        ({"loss": "hybrid"}, "loss is hybrid and variance fixed_large: .* give variance learned_range"),
        ({"loss": "kl", "weight": MinSNRWeight()}, "loss is kl, .* weight MinSNRWeight; give loss mse or hybrid"),
        (
            {"loss": "hybrid", "variance": "learned_range", "bound_weight": 0},
            "bound_weight is 0; give a number above 0",
        ),
    ],
)
def test_what_does_not_go_together(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DDPM(**TINY | settings)
