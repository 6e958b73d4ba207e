"""`parallelize` as users call it: bad settings, and real pipelines in one process."""

from types import SimpleNamespace

import pytest
import torch
from denoisers import TEXT, Sampler, build, ddim
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from asyncdiff_pl.parallel import parallelize


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, "stages is 0; it must be from 1 to 8"),
        ({"stages": 9}, "stages is 9"),
        ({"stages": 2, "stride": 3}, "stride is 3; it must be 1 or 2"),
        ({"stride": 2}, "stride 2 needs at least 2 stages"),
        ({"stages": 2, "warm_up": 0}, "warm_up is 0; at least 1 exact step"),
        ({"stages": 2, "refresh_every": 1}, "refresh_every is 1; give 2 or more .* or null for none"),
        ({"cfg": 4}, "cfg is 4"),
        ({"stages": 3, "cut": [["conv_in"], ["conv_out"]]}, "The cut has 2 stages, but stages is 3; make them equal"),
        ({"stages": 2, "simulate": False}, "needs 2 ranks, but no process group is initialised: start under torchrun"),
        ({"stages": 2, "scheduler": None}, "A bare denoiser needs `scheduler=`"),
    ],
)
def test_bad_settings_are_told_at_once_and_install_nothing(settings, message):
    denoiser = build("sd21")
    with pytest.raises(ValueError, match=message):
        parallelize(denoiser, **{"simulate": True, "scheduler": ddim()} | settings)
    assert not denoiser._forward_pre_hooks
    assert not hasattr(denoiser, "_diffusers_hook")


def test_a_pipeline_without_a_denoiser():
    with pytest.raises(ValueError, match="SimpleNamespace has neither a `unet` nor a `transformer`"):
        parallelize(SimpleNamespace(vae=None), stages=2, simulate=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 2, "cut": [["conv_in", "down"], ["mid_block"]]}, "names 'down' in stage 0, but no unit"),
        ({"stages": 2, "cut": [["conv_in"], ["conv_out"]]}, "leaves out .* units"),
    ],
)
def test_a_cut_that_does_not_fit_is_told_in_the_first_call(settings, message):
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    with pytest.raises(ValueError, match=message):
        Sampler("sd21")(denoiser, scheduler, 2)
    handle.remove()
    Sampler("sd21")(denoiser, scheduler, 2)


def test_a_second_handle_for_the_same_denoiser():
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, stages=2, simulate=True, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is run in parallel already; call `remove\(\)`"):
        parallelize(denoiser, stages=3, simulate=True, scheduler=scheduler)
    handle.remove()
    assert not denoiser._forward_pre_hooks
    again = parallelize(denoiser, stages=3, simulate=True, scheduler=scheduler)
    handle.remove()  # the second time: what came after it stays
    with pytest.raises(ValueError, match="run in parallel already"):
        parallelize(denoiser, stages=3, simulate=True, scheduler=scheduler)
    again.remove()


def test_half_of_an_odd_batch():
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, cfg=2, simulate=True, scheduler=scheduler)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"cfg 2 halves .* a batch of 1: turn guidance on .* once for each half, take"):
        denoiser(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 5, TEXT))
    handle.remove()


def test_the_handle_tells_the_cut():
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, stages=2, simulate=True, scheduler=scheduler)
    assert (handle.cut, handle.cut_hash, handle.bytes_per_step, handle.sent_bytes) == (None, "", 0, 0)
    Sampler("sd21")(denoiser, scheduler, 1)
    cut, hashed = handle.cut, handle.cut_hash
    assert len(cut) == 2
    assert handle.layout.world_size == 2
    handle.remove()
    again = parallelize(denoiser, stages=2, cut=cut, simulate=True, scheduler=scheduler)
    Sampler("sd21")(denoiser, scheduler, 1)
    assert (again.cut, again.cut_hash) == (cut, hashed)
    again.remove()


def test_the_handle_of_one_rank_has_no_cut():
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, scheduler=scheduler)
    Sampler("sd21")(denoiser, scheduler, 2)
    assert (handle.cut, handle.cut_hash, handle.sent_bytes) == (None, "", 0)
    handle.reset()
    handle.remove()


# pipelines insist on this offset
DDIM = {"clip_sample": False, "steps_offset": 1}


def tiny_pipeline(kind):
    """A pipeline whose prompts come as embeddings."""
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = kind(vae=vae, unet=build("sd21"), scheduler=DDIMScheduler(**DDIM), requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings():
    text = Sampler("sd21").kwargs["encoder_hidden_states"]
    return {"negative_prompt_embeds": text[:1], "prompt_embeds": text[1:], "guidance_scale": 3.0}


@pytest.mark.parametrize("settings", [{"stages": 2}, {"stages": 2, "stride": 2, "warm_up": 2}, {"stages": 2, "cfg": 2}])
def test_a_real_pipeline_gives_what_a_bare_loop_gives(settings):
    pipe, sampler, scheduler = tiny_pipeline(StableDiffusionPipeline), Sampler("sd21"), DDIMScheduler(**DDIM)
    handle = parallelize(pipe.unet, simulate=True, scheduler=scheduler, **settings)
    expected = sampler(pipe.unet, scheduler, 7)
    handle.remove()
    handle = parallelize(pipe, simulate=True, **settings)
    for _ in range(2):
        found = pipe(**embeddings(), latents=sampler.latents, num_inference_steps=7, output_type="latent").images
        assert torch.equal(found, expected)
    handle.remove()


class SecondHalf(DDIMScheduler):
    """The second half of a schedule is all of it."""

    def set_timesteps(self, steps):
        super().set_timesteps(steps)
        self.timesteps = self.timesteps[steps // 2 :]


@pytest.mark.parametrize("settings", [{"time_shift": True, "warm_up": 1}, {"stride": 2, "warm_up": 1}])
def test_image_to_image_starts_amid_the_timesteps(settings):
    """With DDIM, which the pipeline does not tell where: as a loop that has only the timesteps that are run."""
    pipe, sampler, started = tiny_pipeline(StableDiffusionImg2ImgPipeline), Sampler("sd21"), []
    handle = parallelize(pipe, stages=2, simulate=True, **settings)
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: started.append(args[0]))
    call = {"image": sampler.latents, "strength": 0.5, "num_inference_steps": 12, "output_type": "latent"}
    found = pipe(**embeddings(), **call, generator=torch.Generator().manual_seed(0)).images
    handle.remove()
    hook.remove()
    sampler.latents, scheduler = started[0][:1], SecondHalf(**DDIM)
    handle = parallelize(pipe.unet, stages=2, simulate=True, scheduler=scheduler, **settings)
    expected = sampler(pipe.unet, scheduler, 12)
    handle.remove()
    assert torch.equal(found, expected)
