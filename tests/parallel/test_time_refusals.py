"""What cannot be solved in parallel in time: settings, pipelines, schedulers, and what changes in a sample's course."""

import functools
import inspect

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim
from time_samples import solved
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import TimeParallel, WarmUp, parallelize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

denoiser_of = functools.cache(build)
pipeline_of = functools.cache(Sample)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "newton"}, "method is newton; take triangular_anderson or picard"),
        ({"ranks": 0}, "ranks is 0; give 1 or more"),
        ({"window": 0}, "window is 0; give 1 or more"),
        ({"memory": 0}, "memory is 0; give 1 or more"),
        ({"tolerance": -1.0}, "tolerance is -1.0; give 0"),
        ({"eta": 2.0}, "eta is 2.0; give one from 0"),
        ({"variation_steps": 3}, "variation_steps is 3, but there is no initial_trajectory"),
        ({"method": "picard", "order": 20}, "order is for triangular_anderson, and method is picard; leave order"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimeParallel(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stages": 2}, "stages is 2; set it to 1"),
        ({"steps": 2}, "steps is 2; set it to 1"),
        ({"cfg": 2}, "cfg is 2; set it to 1"),
        ({"warm_up": 5}, "warm_up is 5, and steps that are solved together have none"),
        ({"warm_up": WarmUp(until_noise=0.9)}, "solved together have none"),
        ({"refresh_every": 4}, "refresh_every is for stages, and steps that are solved together are asked for"),
        ({"simulate": False}, "needs 2 ranks, but no process group is initialised"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, sentence):
    given = {"time": TimeParallel(ranks=2), "simulate": True, "scheduler": ddim()} | settings
    with pytest.raises(ValueError, match=sentence):
        parallelize(denoiser_of("sd21"), **given)


def refused(sample, sentence, **settings):
    with pytest.raises(ValueError, match=sentence):
        solved(sample, **settings)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sd15_pndm", "PNDMScheduler cannot be solved in parallel in time.*take ddim, ddpm or euler_discrete"),
        ("flux", "FlowMatchEulerDiscreteScheduler cannot be solved"),
        ("controlnet", "down_block_additional_residuals, which a ControlNet makes .* take stages or cfg"),
        ("sd15_guidance_ends", "inputs changed at step 3 of a sample, and all its steps were solved"),
    ],
)
def test_pipelines_that_are_refused(name, sentence):
    refused(pipeline_of(name), sentence)


def test_several_calls_a_step():
    sample = Sample("flux_true_cfg")
    sample.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    sample.pipe.scheduler.set_timesteps = functools.partial(set_timesteps, sample.pipe.scheduler)
    refused(sample, "calls the denoiser more than once a step")


def set_timesteps(scheduler, num_inference_steps=None, device=None, sigmas=None, mu=None):
    type(scheduler).set_timesteps(scheduler, len(sigmas), device)


def test_guidance_that_is_not_known():
    sample = Sample("sd15")
    sample.more = {"guidance_rescale": 0.7}
    refused(sample, r"first step's model output is not u \+ s \(c - u\).*guidance_rescale")


def stepwise(**changes):
    """A callback that changes something after a step."""

    def change(pipe, step, timestep, given):
        if step == 2:
            if "scale" in changes:
                pipe._guidance_scale = changes["scale"]
            return {name: value * changes.get(name, 1) for name, value in given.items()}
        return given

    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scale": 5.0}, "Guidance changed in the course of a sample"),
        ({"latents": 1.1}, "changed latents or other inputs of the denoiser in the course"),
        ({"prompt_embeds": 1.1}, "changed latents or other inputs of the denoiser in the course"),
    ],
)
def test_what_a_callback_changes(change, sentence):
    sample = Sample("sd15")
    sample.more = stepwise(**change)
    refused(sample, sentence)
    # one that changes nothing is welcome
    sample.more = stepwise()
    solved(sample)


def test_pictures_that_a_pipeline_blends_in_after_each_step():
    """Inpainting with a denoiser of 4 channels."""
    sample = Sample("sdxl_inpaint")
    sample.pipe.register_modules(unet=Sample("sdxl").pipe.unet)
    refused(sample, "changed latents or other inputs")


def test_noise_that_a_scheduler_does_not_take():
    sample = Sample("sd15")
    sample.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    refused(sample, "eta is 0.5, and the step of EulerDiscreteScheduler takes none", eta=0.5)


def test_a_trajectory_that_does_not_fit():
    trajectory = torch.zeros(1, 5, 4, 8, 8)
    sentence = r"initial_trajectory is \(1, 5, 4, 8, 8\), but 6 steps of these latents need \(1, 7, 4, 8, 8\)"
    refused(pipeline_of("sd15"), sentence, initial_trajectory=trajectory)
    with pytest.raises(ValueError, match="variation_steps is 9; give one from 1 to the number of steps, 6"):
        solved(pipeline_of("sd15"), initial_trajectory=torch.zeros(1, 7, 4, 8, 8), variation_steps=9)


def test_arguments_of_a_step_that_are_not_known():
    denoiser, sampler, scheduler = denoiser_of("sd21"), Sampler("sd21"), ddim()
    handle = parallelize(denoiser, time=TimeParallel(), simulate=True, scheduler=scheduler)
    own = scheduler.step
    assert "use_clipped_model_output" in inspect.signature(own).parameters

    class Clipping:
        def __getattr__(self, name):
            return getattr(scheduler, name)

        def step(self, *args):
            return own(*args, use_clipped_model_output=True)

    with pytest.raises(ValueError, match="is given use_clipped_model_output, which solving steps together does not"):
        sampler(denoiser, Clipping(), 4)
    handle.remove()
