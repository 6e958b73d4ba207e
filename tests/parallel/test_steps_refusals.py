"""What cannot be computed several steps at a time: settings, pipelines, callbacks and schedulers."""

import functools

import diffusers
import pytest
from denoisers import Sampler, build, ddim
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import WarmUp, parallelize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

denoiser_of = functools.cache(build)
pipeline_of = functools.cache(Sample)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"steps": 2, "stages": 3}, "steps is 2 and stages 3; set one of them to 1"),
        ({"steps": 2, "patches": 4}, "steps is 2 and patches 4; set one of them to 1"),
        ({"warm_up": 0}, "warm_up is 0; at least 1 exact step"),
        ({"warm_up": WarmUp(until_noise=0.9)}, "steps take a number of synchronous steps as warm_up"),
        ({"refresh_every": 4}, "refresh_every is for stages, and steps are asked for; leave refresh_every at"),
        ({"time_shift": True}, "time_shift is for stages"),
        ({"mode": "naive"}, "mode naive and portion 1.0 are for patches"),
        ({"simulate": False}, "needs 2 ranks, but no process group is initialised"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallelize(denoiser_of("sd21"), scheduler=ddim(), **{"steps": 2, "simulate": True} | settings)


def refused(pipe, sample, sentence, **settings):
    handle = parallelize(pipe, simulate=True, **{"steps": 2, "warm_up": 1} | settings)
    with pytest.raises(ValueError, match=sentence):
        sample()
    handle.remove()


def test_control_nets():
    sample = pipeline_of("controlnet")
    refused(
        sample.pipe, sample, "given down_block_additional_residuals, which a ControlNet makes .* take stages or cfg"
    )


def test_pictures_that_a_pipeline_blends_in_after_each_step():
    """Inpainting with a denoiser of 4 channels."""
    sample = Sample("sdxl_inpaint")
    plain = Sample("sdxl")
    sample.pipe.register_modules(unet=plain.pipe.unet)
    refused(sample.pipe, sample, "By step 1 the denoiser was not given the latents that the scheduler made")


@pytest.mark.parametrize(("changed", "seen"), [(1, 2), (3, 5)])
def test_latents_that_a_callback_changes(changed, seen):
    """Before the first round of a sample, and before its last one: that is seen when the sample ends."""

    def change(pipe, step, timestep, given):
        return {"latents": given["latents"] * (1.1 if step == changed else 1)}

    sample = Sample("sd15")
    sample.more = {"callback_on_step_end": change}
    refused(sample.pipe, sample, f"By step {seen} the denoiser was not given the latents that the sch", warm_up=2)


class WithPicture(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, guide=None):
        return super().step(model_output, timestep, sample)


class Sealed(diffusers.DDIMScheduler):
    def __init__(self):
        super().__init__(clip_sample=False)
        self.lines = (line for line in "")


def test_schedulers():
    denoiser, sampler, scheduler = denoiser_of("sd21"), Sampler("sd21"), WithPicture(clip_sample=False)
    plain = scheduler.step

    def guided(sample):
        scheduler.step = lambda *args: plain(*args, guide=sampler.latents)

    handle = parallelize(denoiser, steps=2, warm_up=1, simulate=True, scheduler=scheduler)
    own = scheduler.step

    class Guided:
        def __getattr__(self, name):
            return getattr(scheduler, name)

        def step(self, *args):
            return own(*args, guide=sampler.latents)

    with pytest.raises(ValueError, match="step of WithPicture is given a tensor 'guide' beside its latents"):
        sampler(denoiser, Guided(), 4)
    handle.remove()
    sealed = Sealed()
    handle = parallelize(denoiser, steps=2, warm_up=1, simulate=True, scheduler=sealed)
    with pytest.raises(ValueError, match=r"Sealed cannot be copied .*generator.*: take another scheduler"):
        sampler(denoiser, sealed, 4)
    handle.remove()
