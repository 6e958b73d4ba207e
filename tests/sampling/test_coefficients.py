"""The steps as numbers are what diffusers' own schedulers do, step by step."""

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from asyncdiff_pl.sampling import draw_noises, read_coefficients, sequential, triangular_anderson

SHAPE = (4, 6, 5)
NUMBER = 12


def denoise(states, timesteps, samples, steps):
    """Something smooth that uses all that it is given."""
    times = timesteps.to(states.dtype).view(-1, 1, 1, 1) / 300
    return 1.5 * torch.tanh(states + times) - 0.2 * states.roll(1, -1)


def exact(scheduler):
    """Diffusers keeps its tables in float32, which would hide what is compared in float64."""
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def loop(scheduler, latents, generators, **step):
    for time in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, time)
        output = denoise(inputs, time.expand(len(latents)), None, None)
        latents = scheduler.step(output, time, latents, generator=generators, **step).prev_sample
    return latents


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def draw(sources, dtype):
    return torch.cat([torch.randn(1, *SHAPE, generator=source, dtype=dtype) for source in sources])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def check(scheduler, dtype, eta=None):
    scheduler.set_timesteps(NUMBER)
    theirs, ours = generators(), generators()
    start = draw(theirs, dtype) * scheduler.init_noise_sigma
    expected = loop(scheduler, start, theirs, **({} if eta is None else {"eta": eta}))
    latents = draw(ours, dtype) * scheduler.init_noise_sigma
    noises = draw_noises(ours, NUMBER, SHAPE, like=latents)
    coefficients = read_coefficients(scheduler, eta)
    found = sequential(denoise, latents, coefficients, noises=noises)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.latents.dtype == dtype
    assert distance(found.latents, expected) < limit
    solved = triangular_anderson(denoise, latents, coefficients, noises=noises, tolerance=0)
    assert distance(solved.latents, expected) < 30 * limit


DDIM = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"},
    {"set_alpha_to_one": False},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"rescale_betas_zero_snr": True},
    {"clip_sample": True},
    {"clip_sample": True, "prediction_type": "sample", "clip_sample_range": 0.5},
    {"thresholding": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("config", DDIM)
def test_ddim(config, eta, dtype):
    scheduler = DDIMScheduler(**{"clip_sample": False, **config})
    check(exact(scheduler) if dtype == torch.float64 else scheduler, dtype, eta)


DDPM = [
    {},
    {"variance_type": "fixed_small_log", "prediction_type": "v_prediction"},
    {"variance_type": "fixed_large", "steps_offset": 1},
    {"timestep_spacing": "trailing", "prediction_type": "sample"},
    {"clip_sample": True},
    {"thresholding": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", DDPM)
def test_ddpm(config, dtype):
    scheduler = DDPMScheduler(**{"clip_sample": False, **config})
    check(exact(scheduler) if dtype == torch.float64 else scheduler, dtype)


SVD = {
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


@pytest.mark.parametrize(
    "config",
    [
        SVD,
        {"prediction_type": "epsilon"},
        {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        {"prediction_type": "sample", "use_karras_sigmas": True},
    ],
)
def test_euler(config):
    check(EulerDiscreteScheduler(**config), torch.float32)


def test_an_euler_scheduler_made_of_a_clipping_one_does_not_clip():
    check(EulerDiscreteScheduler.from_config(DDIMScheduler().config), torch.float32)


def test_other_schedulers_of_the_kind():
    check(exact(DDIMParallelScheduler(clip_sample=False)), torch.float64, 1.0)
    check(exact(DDPMParallelScheduler(clip_sample=False)), torch.float64)


def test_ddpm_without_noise_is_the_ode():
    scheduler, other = DDPMScheduler(clip_sample=False, variance_type="learned"), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(NUMBER)
    other.set_timesteps(NUMBER)
    latents = draw(generators(), torch.float64)
    found, expected = (sequential(denoise, latents, read_coefficients(one, 0.0)).latents for one in (scheduler, other))
    assert distance(found, expected) < 1e-12


def ready(scheduler):
    scheduler.set_timesteps(NUMBER)
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "eta", "message"),
    [
        (ready(PNDMScheduler()), None, "PNDMScheduler cannot be solved in parallel in time.*take ddim, ddpm or euler"),
        (DDIMScheduler(), None, "no timesteps yet; call its set_timesteps"),
        (ready(DDIMScheduler()), 1.5, "eta is 1.5; give one from 0"),
        (
            ready(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")),
            None,
            "signal-to-noise ratio of zero.*timestep_spacing to leading",
        ),
        (ready(DDPMScheduler(variance_type="learned_range")), None, "variance_type learned_range.*or eta to 0"),
        (ready(DDPMScheduler(variance_type="fixed_large_log")), None, "set variance_type to fixed_small"),
        (ready(DDIMScheduler(set_alpha_to_one=False)), None, "clips the clean data.*set clip_sample and thresholding"),
    ],
)
def test_what_cannot_be_solved_is_refused(scheduler, eta, message):
    with pytest.raises(ValueError, match=message):
        read_coefficients(scheduler, eta)


def test_noises_of_another_shape_are_refused():
    scheduler = ready(DDIMScheduler(clip_sample=False))
    latents = torch.randn(2, *SHAPE)
    for noises, given in ((None, "none are given"), (torch.randn(2, 3, *SHAPE), r"\(2, 3, 4, 6, 5\)")):
        with pytest.raises(ValueError, match=rf"need noises \(2, 12, 4, 6, 5\), but.*{given}"):
            sequential(denoise, latents, read_coefficients(scheduler, 1.0), noises=noises)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_last_steps_alone_begin_where_the_others_end(kind):
    scheduler = exact(kind())
    scheduler.set_timesteps(NUMBER)
    coefficients = read_coefficients(scheduler)
    whole = sequential(denoise, draw(generators(), torch.float64) * scheduler.init_noise_sigma, coefficients)
    middle = whole.trajectory[:, 5] * coefficients.latent_scales[5]
    found = sequential(denoise, middle, coefficients.last(5))
    assert distance(found.latents, whole.latents) < 1e-12
    assert distance(whole.trajectory[:, 0] * coefficients.latent_scales[0], whole.latents) < 1e-12
