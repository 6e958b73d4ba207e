"""Scenarios of test_ranks.py with stages and halves of the guidance batch: uses, warm-ups, and what changes.

Each returns latents, the same for the ranks and for one process that plays them.
"""

import time

import pytest
import torch
import torch.distributed as dist
from cuts import split_attentions
from denoisers import NAMES, Sampler, build, ddim
from diffusers import DDPMScheduler

from asyncdiff_pl.parallel import WarmUp, parallelize


def sample(name, simulate, samplers=None, steps=7, **settings):
    """Some samples with one handle."""
    denoiser, scheduler = build(name), ddim()
    parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    return [sampler(denoiser, scheduler, steps) for sampler in samplers or [Sampler(name)]]


def guidance(simulate):
    return [latents for name in NAMES for latents in sample(name, simulate, steps=4, cfg=2)]


def guidance_and_stages(simulate):
    found = sample("sdxl", simulate, stages=2, cfg=2)
    return found + sample("animatediff", simulate, stages=2, cfg=2, warm_up=2, steps=6)


def blocks_of_an_attention(simulate):
    """An attention's blocks lie in several stages, and both ends of the denoiser in one."""
    return sample("sdxl", simulate, stages=3, warm_up=1, cut=split_attentions(3))


def ahead_with_an_extra_rank(simulate):
    return sample("sdxl", simulate, stages=3, stride=2, warm_up=2, time_shift=True, steps=9)


def changes(simulate, stops=(1, 4), **settings):
    """Another resolution, another batch, a batch that grows in mid-sample, broken off samples, a reset."""
    settings = {"stages": 2, "warm_up": 2} | settings
    denoiser, scheduler = build("sd21"), ddim()
    one, large, two = Sampler("sd21"), Sampler("sd21", size=16), Sampler("sd21", batch=2)
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    found = [sampler(denoiser, scheduler, 5) for sampler in (one, large, two, one)]
    # in warm-up, and where messages are under way
    for stop in stops:
        found.append(large(denoiser, scheduler, 7, stop=stop))
        found.append(one(denoiser, scheduler, 5))
    one(denoiser, scheduler, 7, stop=4)
    handle.reset()
    found.append(one(denoiser, scheduler, 5))
    scheduler.set_timesteps(8)
    latents = one.latents
    for step, t in enumerate(scheduler.timesteps):
        if step == 4:
            latents = torch.cat([latents] * 2)
        estimate = (one if step < 4 else two).estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    return [*found, latents]


def changes_with_stride(simulate):
    return changes(simulate, stride=2)


def two_calls_a_step(simulate, **settings):
    denoiser, scheduler = build("sd21"), ddim()
    main, extra = Sampler("sd21"), Sampler("sd21", seed=8)
    settings = {"stages": 2, "warm_up": 2} | settings
    parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    scheduler.set_timesteps(9)
    latents = main.latents
    for step, t in enumerate(scheduler.timesteps):
        estimate = main.estimate(denoiser, scheduler, latents, t)
        if step >= 2:
            estimate = estimate + 0.5 * extra.estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    return [latents]


def by_need(simulate, **settings):
    """Warm-ups that end when drift is low: all ranks must come to it in the same step, sample by sample."""
    denoiser, scheduler, found = build("sd21"), ddim(), []
    settings = {"stages": 2, "warm_up": WarmUp(until_drift=0.35), "refresh_every": 3} | settings
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    for sampler, start in ((Sampler("sd21"), 0), (Sampler("sd21", seed=6, batch=2), 0), (Sampler("sd21"), 3)):
        found.append(sampler(denoiser, scheduler, 11, start=start))
        assert 1 < handle.exact_steps < 11 - start
        found.append(torch.tensor(handle.exact_steps))
    return found


def by_need_in_two_calls_a_step(simulate):
    return two_calls_a_step(simulate, warm_up=WarmUp(until_drift=0.35), refresh_every=3)


def by_need_with_an_extra_rank(simulate):
    return by_need(simulate, stride=2, time_shift=True, refresh_every=4)


def by_need_with_guidance(simulate):
    return by_need(simulate, cfg=2, warm_up=WarmUp(until_noise=0.97, until_drift=0.35, at_most=6))


def late_receiver(simulate, **settings):
    """FreeU writes into what was sent while the other rank is not there yet to receive it."""
    inside = [f"up_blocks.1.{part}" for part in ("resnets.0", "attentions.0")]
    after = [f"up_blocks.1.{part}" for part in ("resnets.1", "attentions.1", "resnets.2", "attentions.2", "upsamplers")]
    cut = [["conv_in", "down_blocks", "mid_block", "up_blocks.0", *inside]]
    cut.append([*after, "up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"])
    denoiser, scheduler = build("sd15"), ddim()
    denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6)
    parallelize(denoiser, stages=2, warm_up=1, cut=cut, simulate=simulate, scheduler=scheduler, **settings)

    def before_step(step):
        if not simulate and dist.get_rank() == 1:
            time.sleep(0.1)
        return {}

    return [Sampler("sd15")(denoiser, scheduler, 6, before_step)]


def inference_mode(simulate):
    with torch.inference_mode():
        found = sample("sdxl", simulate, [Sampler("sdxl"), Sampler("sdxl", batch=2)], stages=2, warm_up=1, steps=5)
        found += sample("svd", simulate, stages=2, warm_up=1, steps=4)
        return [latents.clone() for latents in found]


def autocast(simulate):
    with torch.autocast("cpu", torch.bfloat16):
        return sample("sd21", simulate, stages=2, warm_up=1)


def two_data_groups(group, simulate):
    """Each data group has samples of its own, the second one more than the first."""
    samplers = [Sampler("sd21", seed=10 * group + i) for i in range(1, 3 + group)]
    return sample("sd21", simulate, samplers, stages=2, warm_up=2)


STAGES = {
    2: [
        guidance,
        changes,
        two_calls_a_step,
        by_need,
        by_need_in_two_calls_a_step,
        late_receiver,
        inference_mode,
        autocast,
    ],
    3: [changes_with_stride, blocks_of_an_attention, by_need_with_an_extra_rank],
    4: [guidance_and_stages, ahead_with_an_extra_rank, by_need_with_guidance],
}

# -- what is no comparison -----------------------------------------------------------------------------------------


def ranks_with_other_noise(rank):
    for seeds in ((0, 1), (1, 0)):
        denoiser, scheduler = build("sd21"), ddim()
        handle = parallelize(denoiser, stages=2, scheduler=scheduler)
        with pytest.raises(ValueError, match=r"different inputs: .* same seed \(`generator="):
            Sampler("sd21", seed=seeds[rank])(denoiser, scheduler, 5)
        handle.remove()


def ranks_with_another_prompt(rank):
    """One of them an empty one, which is all zeros."""
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    sampler.kwargs["encoder_hidden_states"] *= rank
    handle = parallelize(denoiser, stages=2, scheduler=scheduler)
    with pytest.raises(ValueError, match="different inputs"):
        sampler(denoiser, scheduler, 5)
    handle.remove()


def ranks_with_other_noise_in_the_steps(rank):
    """The scheduler's own, drawn from the global state."""
    denoiser, scheduler = build("sd21"), DDPMScheduler()
    handle = parallelize(denoiser, stages=2, scheduler=scheduler, warm_up=2)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match=r"drifted apart in the first 2 steps.*`generator=`"):
        Sampler("sd21")(denoiser, scheduler, 5)
    handle.remove()
    handle = parallelize(denoiser, stages=2, scheduler=scheduler, warm_up=2)
    torch.manual_seed(0)
    Sampler("sd21")(denoiser, scheduler, 5)
    handle.remove()


def ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match="does not fit 2 ranks"):
        parallelize(build("sd21"), stages=3, scheduler=ddim())


def removal_on_ranks(rank):
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    expected = sampler(denoiser, ddim(), 5)
    handle = parallelize(denoiser, stages=2, scheduler=scheduler)
    sampler(denoiser, scheduler, 9, stop=5)
    assert handle.bytes_per_step > 0
    # the last stage's outputs go to nobody but by the estimate's broadcast
    assert (handle.sent_bytes > 0) == (rank == 0)
    handle.remove()
    assert torch.equal(sampler(denoiser, scheduler, 5), expected)


STAGE_CHECKS = {
    2: [
        ranks_with_other_noise,
        ranks_with_another_prompt,
        ranks_with_other_noise_in_the_steps,
        ranks_that_do_not_fit,
        removal_on_ranks,
    ]
}
