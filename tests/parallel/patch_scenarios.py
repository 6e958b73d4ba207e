"""Scenarios of test_ranks.py with patches: modes, kinds, and what changes from sample to sample.

In double precision where variances may come near to nothing (`corrected_async_gn`): rounding is then made much larger.
"""

from unittest.mock import patch

import pytest
import torch
from denoisers import GAIN, TEXT, Sampler, build, ddim, one_level
from diffusers import DDPMScheduler, UNet2DConditionModel
from pipeline_scenarios import of_pipelines
from tiny_pipelines import CASES
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_map

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.patches.settings import MODES

COLUMNS = 8


def tall(name: str, rows: int, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 5) -> Sampler:
    """A sample whose pictures are as narrow as they may be."""
    sampler = Sampler(name, batch=batch, size=rows, seed=seed)
    sampler.latents = sampler.latents[..., :COLUMNS].to(dtype)
    sampler.kwargs = tree_map(lambda tensor: tensor.to(dtype), sampler.kwargs)
    if sampler.condition is not None:
        sampler.condition = sampler.condition[..., :COLUMNS].to(dtype)
    return sampler


def double(name: str) -> nn.Module:
    """A tiny denoiser in double precision."""
    # past diffusers' own method, which warns
    return nn.Module.to(build(name), torch.float64)


def two_levels() -> nn.Module:
    """A denoiser with each kind of layer that looks beyond a patch, in double precision, for a sampler of sd21."""
    torch.manual_seed(3)
    denoiser = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
    )
    with torch.no_grad():
        # what is stale must show
        for weight in denoiser.parameters():
            if weight.ndim > 1:
                weight.mul_(GAIN)
    return nn.Module.to(denoiser, torch.float64).requires_grad_(False).eval()


def of_samplers(denoiser, samplers, simulate, steps=3, **settings) -> list[torch.Tensor]:
    """Some samples with one handle."""
    scheduler = ddim()
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    found = [sampler(denoiser, scheduler, steps) for sampler in samplers]
    handle.remove()
    return found


def exact_patches(simulate, names=("sd15", "sdxl", "svd", "animatediff"), rows=24, **settings):
    """24 rows in two patches are 16 + 8, and 12 rows of SDXL are 8 + 4."""
    found = []
    for name in names:
        samplers = [tall(name, rows // 2 if name == "sdxl" else rows)]
        found += of_samplers(build(name), samplers, simulate, 2, **{"patches": 2} | settings)
    return found


def modes(simulate, names=MODES, rows=10, **settings):
    """One picture or three, of 6 + 4 rows."""
    denoiser, found, settings = two_levels(), [], {"patches": 2, "warm_up": 1} | settings
    for at, mode in enumerate(names):
        sampler = tall("sd21", rows, torch.float64, batch=3 if at % 3 == 1 else 1)
        portion = 1.0 if mode in ("full_sync", "naive") else 0.3
        found += of_samplers(denoiser, [sampler], simulate, mode=mode, portion=portion, **settings)
    return found


def stale_videos(simulate):
    found, settings = [], {"patches": 2, "warm_up": 1, "mode": "corrected_async_gn", "portion": 0.5}
    for name in ("svd", "animatediff"):
        found += of_samplers(double(name), [tall(name, 24, torch.float64)], simulate, **settings)
    return found


def compiled_patches(simulate):
    """The ranks compile, the simulation does not."""
    settings = {"patches": 2, "compile": "none" if simulate else "blocks"}
    # as torch takes graphs apart for Inductor: test_patch_compiling.py
    with patch.object(compiling, "BACKEND", "eager"):
        return of_samplers(one_level(), [tall("sd21", 6, torch.float64)], simulate, **settings)


def compiled_patches_without_guidance(simulate):
    """Of a batch of one, keys and values are read where they come in; a layer that is hooked is called, then not."""
    denoiser, sampler, scheduler, codes = one_level(), tall("sd21", 6, torch.float64), ddim(), []
    hooked = denoiser.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v

    def backend(graph, inputs):
        # as torch takes graphs apart for Inductor
        codes.append(graph.code)
        return aot_eager(graph, inputs)

    def sample(seed):
        latents, texts = sampler.latents[:1] + seed, sampler.kwargs["encoder_hidden_states"][:1]
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            latents = scheduler.step(denoiser(latents, t, texts).sample, t, latents).prev_sample
        return latents

    with patch.object(compiling, "BACKEND", backend):
        compiled = "none" if simulate else "blocks"
        handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, patches=2, compile=compiled)
        found = [sample(0)]
        hook = hooked.register_forward_hook(lambda module, args, output: output * 2)
        found.append(sample(1))
        hook.remove()
        found.append(sample(1))
        handle.remove()
    assert not torch.equal(found[1], found[2])
    if not simulate:
        # each kind of block has one graph for all of its layers
        assert sum("project_and_extend" in code for code in codes) == 1
        assert sum("asyncdiff_pl.extend" in code for code in codes) == 1
    return found


def changing_patches(simulate):
    """Another resolution, another batch, a batch that grows in mid-sample, broken off samples, a reset."""
    denoiser, scheduler = two_levels(), ddim()
    one, large, three = (
        tall("sd21", *each) for each in ((6, torch.float64), (10, torch.float64), (6, torch.float64, 3))
    )
    settings = {"patches": 2, "mode": "stale_gn", "portion": 0.3, "warm_up": 1}
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    found = [sampler(denoiser, scheduler, 3) for sampler in (one, large, three, one)]
    for stop in (1, 3):
        large(denoiser, scheduler, 6, stop=stop)
        found.append(one(denoiser, scheduler, 3))
    one(denoiser, scheduler, 6, stop=3)
    handle.reset()
    found.append(one(denoiser, scheduler, 3))
    # what was sampled before leaves no trace
    assert all(torch.equal(latents, found[0]) for latents in found[3:])
    scheduler.set_timesteps(6)
    latents = one.latents
    for step, t in enumerate(scheduler.timesteps):
        if step == 3:
            latents = torch.cat([latents] * 3)
        estimate = (one if step < 3 else three).estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    handle.remove()
    return [*found, latents]


def patches_in_two_calls_a_step(simulate):
    denoiser, scheduler = two_levels(), ddim()
    main, extra = tall("sd21", 6, torch.float64), tall("sd21", 6, torch.float64, seed=8)
    settings = {"patches": 2, "mode": "sync_gn", "warm_up": 1}
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    scheduler.set_timesteps(5)
    latents = main.latents
    for step, t in enumerate(scheduler.timesteps):
        estimate = main.estimate(denoiser, scheduler, latents, t)
        if step >= 1:
            estimate = estimate + 0.5 * extra.estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    handle.remove()
    return [latents]


PIPELINES_IN_TWO = ["controlnets", "sdxl_ip_adapter", "sd15_pndm", *(name for name in CASES if name == "sd15_lora")]
STALE = {"mode": "stale_gn", "portion": 0.5, "warm_up": 1}


def pipelines_in_patches(simulate):
    return of_pipelines(PIPELINES_IN_TWO, simulate, patches=2) + of_pipelines(
        ["sdxl_controlnet"], simulate, patches=2, **STALE
    )


def three_patches(simulate):
    exact = exact_patches(simulate, ("sdxl", "svd"), 32, patches=3)
    return exact + modes(simulate, ("corrected_async_gn", "stale_gn", "no_sync"), 8, patches=3)


def four_patches(simulate):
    return modes(simulate, ("full_sync", "corrected_async_gn", "sync_gn"), 10, patches=4)


def patches_of_halves(simulate):
    """cfg 2 x 2 patches; guidance that ends in mid-run as well."""
    found = exact_patches(simulate, ("sd21", "svd"), cfg=2)
    found += modes(simulate, ("corrected_async_gn", "stale_gn", "separate_gn"), cfg=2)
    return found + of_pipelines(["sd15_guidance_ends", "sdxl_controlnet"], simulate, cfg=2, patches=2, **STALE)


PATCHES = {
    2: [
        exact_patches,
        modes,
        stale_videos,
        compiled_patches,
        compiled_patches_without_guidance,
        changing_patches,
        patches_in_two_calls_a_step,
        pipelines_in_patches,
    ],
    3: [three_patches],
    4: [four_patches, patches_of_halves],
}

# -- what is no comparison -----------------------------------------------------------------------------------------


def patches_are_removed_on_ranks(rank):
    """Messages are under way when the sample is broken off."""
    denoiser, scheduler, sampler = build("sdxl"), ddim(), tall("sdxl", 12)
    expected = sampler(denoiser, ddim(), 4)
    handle = parallelize(denoiser, patches=2, mode="corrected_async_gn", warm_up=1, scheduler=scheduler)
    sampler(denoiser, scheduler, 6, stop=3)
    assert handle.sent_bytes > 0
    assert handle.asynchronous_steps == 2
    handle.remove()
    assert torch.equal(sampler(denoiser, scheduler, 4), expected)


def patches_with_other_noise(rank):
    """Found before anything is computed."""
    denoiser, scheduler = build("sdxl"), ddim()
    handle = parallelize(denoiser, patches=2, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"different inputs: .* same seed"):
        tall("sdxl", 12, seed=rank)(denoiser, scheduler, 3)
    handle.remove()


def patches_with_other_noise_in_the_steps(rank):
    """The scheduler's own; modes without warm-up are compared after the first step."""
    for mode in ("full_sync", "naive"):
        denoiser, scheduler = build("sd21"), DDPMScheduler()
        handle = parallelize(denoiser, patches=2, mode=mode, scheduler=scheduler)
        torch.manual_seed(rank)
        with pytest.raises(ValueError, match=r"drifted apart in the first 1 steps.*`generator=`"):
            tall("sd21", 16)(denoiser, scheduler, 3)
        handle.remove()


def patches_that_do_not_fit_the_ranks(rank):
    with pytest.raises(ValueError, match=r"cfg 1 x patches 3 = 3 ranks does not fit 2 ranks"):
        parallelize(build("sdxl"), patches=3, scheduler=ddim())


def bytes_of_ranks_are_those_of_the_simulation(rank):
    """Beside them each rank sends its rows of the estimate to the others."""
    sent = []
    for simulate in (True, False):
        denoiser, scheduler = build("sdxl"), ddim()
        settings = {"patches": 2, "mode": "corrected_async_gn", "portion": 0.3, "warm_up": 1}
        handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
        tall("sdxl", 12)(denoiser, scheduler, 4)
        sent.append(handle.sent_bytes)
        handle.remove()
    rows, guidance, channels, itemsize, steps = (8, 4)[rank], 2, 4, 4, 4
    total = torch.tensor(sent[1] - steps * guidance * channels * rows * COLUMNS * itemsize)
    torch.distributed.all_reduce(total)
    assert int(total) == sent[0]


PATCH_CHECKS = {
    2: [
        patches_are_removed_on_ranks,
        patches_with_other_noise,
        patches_with_other_noise_in_the_steps,
        patches_that_do_not_fit_the_ranks,
        bytes_of_ranks_are_those_of_the_simulation,
    ]
}
