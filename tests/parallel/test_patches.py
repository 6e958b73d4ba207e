"""Patches in one process that plays all of them: what is equal to what, and what is refused.

The ranks themselves: test_ranks.py. Modes that are not exact: test_patch_definition.py.
"""

import contextlib
import copy
import functools

import pytest
import torch
from denoisers import Sampler, build, ddim
from diffusers import UNet2DConditionModel
from patch_scenarios import tall, two_levels
from tiny_pipelines import CASES, KINDS, Sample

from asyncdiff_pl.parallel import WarmUp, parallelize
from asyncdiff_pl.parallel.patches.settings import MODES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

denoiser_of = functools.cache(build)
pipeline_of = functools.cache(Sample)


@functools.cache
def exact(name: str) -> torch.Tensor:
    """A pipeline's result on one rank."""
    return pipeline_of(name)()


@contextlib.contextmanager
def installed(pipe, scheduler=None, **settings):
    handle = parallelize(pipe, simulate=True, scheduler=scheduler, **settings)
    try:
        yield handle
    finally:
        handle.remove()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- full_sync is exact --------------------------------------------------------------------------------------------


IN_TWO, IN_THREE, IN_FOUR = (2, 1, 3, 24), (3, 2, 1, 32), (4, 1, 1, 40)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sd15", IN_TWO),
        ("sd15", IN_FOUR),
        ("sd21", IN_THREE),
        ("sdxl", IN_TWO),
        ("sdxl", IN_FOUR),
        ("svd", IN_TWO),
        ("svd", IN_THREE),
        ("animatediff", IN_TWO),
        ("animatediff", IN_THREE),
    ],
)
def test_full_sync_gives_what_one_rank_gives(name, layout):
    """Shares are uneven: 16 + 8, 16 + 8 + 8, 16 + 8 + 8 + 8 rows, of SDXL half as many."""
    denoiser, scheduler = denoiser_of(name), ddim()
    patches, cfg, batch, rows = layout
    sampler = tall(name, rows // 2 if name == "sdxl" else rows, batch=batch)
    expected = sampler(denoiser, ddim(), 2)
    with installed(denoiser, scheduler, patches=patches, cfg=cfg) as handle:
        assert distance(sampler(denoiser, scheduler, 2), expected) < 1e-5
        assert (handle.exact_steps, handle.asynchronous_steps) == (2, 0)


TRANSFORMERS = ("sd3", "flux", "flux_true_cfg", "dit")
UNETS = [name for name in KINDS if name not in TRANSFORMERS]
UNETS += [name for name, case in CASES.items() if case.kind in UNETS]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.filterwarnings("ignore:The denoiser's inputs changed")
def test_full_sync_of_every_pipeline(name):
    """ControlNets, adapters, LoRA, guidance that ends, image to image, schedulers that repeat timesteps."""
    with installed(pipeline_of(name).pipe, patches=2):
        assert distance(pipeline_of(name)(), exact(name)) < 1e-5


@pytest.mark.parametrize("name", ["controlnet", "sd15_guidance_ends", "sdxl_ip_adapter", "animatediff_of_three"])
def test_full_sync_of_pipelines_in_halves(name):
    with installed(pipeline_of(name).pipe, patches=3, cfg=2):
        assert distance(pipeline_of(name)(), exact(name)) < 1e-5


def test_columns_need_not_be_halved_without_a_rest():
    denoiser, scheduler, sampler = denoiser_of("sd21"), ddim(), Sampler("sd21", size=16)
    sampler.latents = sampler.latents[..., :13]
    expected = sampler(denoiser, ddim(), 2)
    with installed(denoiser, scheduler, patches=2):
        assert distance(sampler(denoiser, scheduler, 2), expected) < 1e-5


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("full_sync", "naive")])
def test_warm_up_to_the_end_is_full_sync(mode):
    denoiser, scheduler, sampler, found = denoiser_of("sd21"), ddim(), tall("sd21", 16), []
    for settings in ({"mode": "full_sync"}, {"mode": mode, "warm_up": 3, "portion": 0.3}):
        with installed(denoiser, scheduler, patches=2, **settings) as handle:
            found.append(sampler(denoiser, scheduler, 3))
            assert (handle.exact_steps, handle.asynchronous_steps) == (3, 0)
    # full_sync sends rows from before a norm, not from after it
    assert distance(*found) < 1e-5


# -- any mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_leaves_no_trace_in_the_next(mode):
    denoiser, scheduler = two_levels(), ddim()
    one, other = (tall("sd21", 6, torch.float64, seed=seed) for seed in (5, 6))
    with installed(denoiser, scheduler, patches=2, mode=mode, warm_up=1):
        expected = one(denoiser, scheduler, 2)
    with installed(denoiser, scheduler, patches=2, mode=mode, warm_up=1) as handle:
        other(denoiser, scheduler, 2)
        assert torch.equal(one(denoiser, scheduler, 2), expected)
        other(denoiser, scheduler, 4, stop=2)
        assert torch.equal(one(denoiser, scheduler, 2), expected)
        other(denoiser, scheduler, 4, stop=2)
        handle.reset()
        assert torch.equal(one(denoiser, scheduler, 2), expected)


@pytest.mark.parametrize(
    ("name", "steps", "cfg"), [("img2img", 6, 2), ("img2img_pndm", 7, 1), ("sd15_heun", 11, 1), ("sd15_heun", 11, 2)]
)
def test_all_but_the_last_step_send(name, steps, cfg):
    """Also where a pipeline runs a part of the timesteps, or repeats some."""
    with installed(pipeline_of(name).pipe, patches=2, cfg=cfg, mode="stale_gn", warm_up=2) as handle:
        pipeline_of(name)()
        assert (handle.exact_steps, handle.asynchronous_steps) == (2, steps - 2)
        # with portion 1 exact steps send as much as others
        assert handle.sent_bytes == (steps - 1) * handle.bytes_per_step > 0


@pytest.mark.parametrize("name", ["sdxl", "svd", "animatediff"])
def test_removal_gives_the_denoiser_back(name):
    denoiser, scheduler = build(name), ddim()
    sampler = tall(name, 16)
    attributes = {part: set(vars(module)) for part, module in denoiser.named_modules()}
    expected = sampler(denoiser, scheduler, 2)
    with installed(denoiser, scheduler, patches=2, mode="stale_gn", warm_up=1):
        assert not torch.equal(sampler(denoiser, scheduler, 2), expected)
    assert {part: set(vars(module)) for part, module in denoiser.named_modules()} == attributes
    assert torch.equal(sampler(denoiser, scheduler, 2), expected)
    assert torch.equal(sampler(copy.deepcopy(denoiser), scheduler, 2), expected)


def test_another_batch_in_mid_sample_warms_up_anew():
    denoiser, scheduler = denoiser_of("sdxl"), ddim()
    one, two = tall("sdxl", 8), tall("sdxl", 8, batch=2)

    def walk(sampler, latents, start, stop):
        for t in scheduler.timesteps[start:stop]:
            latents = scheduler.step(sampler.estimate(denoiser, scheduler, latents, t), t, latents).prev_sample
        return latents

    with installed(denoiser, scheduler, patches=2, mode="separate_gn", warm_up=2) as handle:
        scheduler.set_timesteps(7)
        middle = torch.cat([walk(one, one.latents, 0, 3)] * 2)
        with pytest.warns(UserWarning, match="inputs changed at step 3 of a sample: warm-up starts again"):
            late = walk(two, middle, 3, 5)
        walk(two, late, 5, 7)
        assert (handle.exact_steps, handle.asynchronous_steps) == (4, 3)
    assert distance(late, walk(two, middle, 3, 5)) < 1e-5


def test_half_precision():
    denoiser, scheduler, sampler = build("sd21").to(torch.bfloat16), ddim(), tall("sd21", 16, torch.bfloat16)
    expected = sampler(denoiser, ddim(), 3)
    for mode in ("full_sync", "corrected_async_gn"):
        with installed(denoiser, scheduler, patches=2, mode=mode, warm_up=2):
            found = sampler(denoiser, scheduler, 3)
        assert found.dtype == torch.bfloat16
        assert distance(found.float(), expected.float()) < 0.03


def test_in_inference_mode():
    denoiser, scheduler, sampler, found = denoiser_of("sdxl"), ddim(), tall("sdxl", 8), []
    for mode in (False, True):
        with (
            torch.inference_mode(mode),
            installed(denoiser, scheduler, patches=2, mode="corrected_async_gn", warm_up=1),
        ):
            found.append(sampler(denoiser, scheduler, 4))
    assert torch.equal(*found)


def test_attention_is_the_processors():
    """What is set there keeps its effect: slices of the heads, one after another."""
    denoiser, scheduler, sampler, found = build("sd15"), ddim(), tall("sd15", 16), []
    for set_up in (lambda: None, lambda: denoiser.set_attention_slice(1)):
        set_up()
        with installed(denoiser, scheduler, patches=2, mode="stale_gn", warm_up=1, portion=0.5):
            found.append(sampler(denoiser, scheduler, 3))
    assert distance(*found) < 1e-5


@pytest.mark.skipif("sd15_lora" not in CASES, reason="peft is not installed")
def test_an_adapter_may_come_and_go():
    """Its layers lie around those of the network, keys and values among them."""
    settings = {"patches": 2, "mode": "stale_gn", "warm_up": 1, "portion": 0.5}
    expected = []
    for name in ("sd15", "sd15_lora"):
        with installed(pipeline_of(name).pipe, **settings):
            expected.append(pipeline_of(name)())
    sample = Sample("sd15")
    plain = sample()
    with installed(sample.pipe, **settings):
        assert torch.equal(sample(), expected[0])
        CASES["sd15_lora"].change(sample.pipe)
        assert torch.equal(sample(), expected[1])
        sample.pipe.unload_lora_weights()
        assert torch.equal(sample(), expected[0])
    assert torch.equal(sample(), plain)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patches": 0}, "patches is 0; give 1 or more"),
        ({"patches": 2, "stages": 2}, "stages is 2 and patches 2; set one of them to 1"),
        ({"patches": 2, "mode": "asynchronous"}, "mode is asynchronous; give one of full_sync, corrected_async_gn"),
        ({"patches": 2, "mode": "stale_gn", "portion": 1.5}, "portion is 1.5; give a share .* from 0 to 1"),
        ({"patches": 2, "mode": "stale_gn", "portion": -0.1}, "portion is -0.1; give a share"),
        ({"patches": 2, "portion": 0.3}, "mode full_sync computes exactly, and portion 0.3 .*: take portion 1"),
        ({"patches": 2, "mode": "naive", "portion": 0.3}, "mode naive sees no other rows, and portion 0.3"),
        ({"patches": 2, "mode": "stale_gn", "warm_up": 0}, "warm_up is 0; at least 1 synchronous step"),
        ({"patches": 2, "warm_up": WarmUp(until_drift=0.1)}, "patches take a number of .* until drift 0.1"),
        (
            {"patches": 2, "compile": "full"},
            "compile full takes a denoiser that is whole, and patches is 2; take compile",
        ),
        ({"patches": 2, "refresh_every": 3}, "refresh_every is for stages"),
        ({"patches": 2, "time_shift": True}, "time_shift is for stages"),
        ({"patches": 2, "cut": [["conv_in"]]}, "cut is for stages"),
        ({"patches": 2, "balance": "measured"}, "balance is for stages"),
        ({"patches": 2, "warm_up_mode": "relay"}, "warm_up_mode is for stages"),
        ({"patches": 2, "simulate": False}, "needs 2 ranks, but no process group is initialised"),
    ],
)
def test_bad_settings_are_told_at_once_and_install_nothing(settings, message):
    denoiser, scheduler = denoiser_of("sdxl"), ddim()
    with pytest.raises(ValueError, match=message):
        parallelize(denoiser, **{"simulate": True, "scheduler": scheduler} | settings)
    assert_plain(denoiser, scheduler)


@pytest.mark.parametrize(
    ("name", "rows", "patches", "message"),
    [
        ("sd15", 20, 2, "20 rows, and a UNet that halves them 3 times .* in multiples of 8: change the height"),
        ("sdxl", 10, 2, "10 rows, .* in multiples of 4"),
        ("sd15", 16, 3, "3 patches do not fit 16 rows .* at most 2 fit; take fewer patches or a larger picture"),
    ],
)
def test_rows_that_cannot_be_shared(name, rows, patches, message):
    denoiser, scheduler = denoiser_of(name), ddim()
    with installed(denoiser, scheduler, patches=patches), pytest.raises(ValueError, match=message):
        tall(name, rows)(denoiser, scheduler, 2)


def assert_plain(denoiser, scheduler):
    """Nothing is left of what was refused."""
    assert not any(hasattr(module, "_diffusers_hook") for module in denoiser.modules())
    assert not denoiser._forward_pre_hooks
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    pipe = Sample(name).pipe
    with pytest.raises(ValueError, match=f"Patches are for the UNets .* is a {type(pipe.transformer).__name__}; take"):
        parallelize(pipe, patches=2, simulate=True)
    assert_plain(pipe.transformer, pipe.scheduler)


def test_free_u():
    denoiser, scheduler, sampler = build("sd15"), ddim(), tall("sd15", 16)
    denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with installed(denoiser, scheduler, patches=2):
        with pytest.raises(ValueError, match=r"FreeU filters .* call `disable_freeu\(\)`, or take stages or cfg"):
            sampler(denoiser, scheduler, 2)
        denoiser.disable_freeu()
        assert distance(sampler(denoiser, scheduler, 2), sampler(denoiser_of("sd15"), ddim(), 2)) < 1e-5


def test_fused_projections():
    """Before and after; once they are taken apart again all is well."""
    denoiser, scheduler, sampler = build("sd15"), ddim(), tall("sd15", 16)
    expected, message = sampler(denoiser, ddim(), 2), r"attn1 has fused projections; call `unfuse_qkv_projections\(\)`"
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match=message):
        parallelize(denoiser, patches=2, simulate=True, scheduler=scheduler)
    assert_plain(denoiser, scheduler)
    denoiser.unfuse_qkv_projections()
    with installed(denoiser, scheduler, patches=2):
        assert distance(sampler(denoiser, scheduler, 2), expected) < 1e-5
        denoiser.fuse_qkv_projections()
        with pytest.raises(ValueError, match=message):
            sampler(denoiser, scheduler, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_type": "gated"}, r"fuser.attn is an attention of a kind that patches do not know"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, r"down_blocks.0.attentions.0 is an attention of a"),
    ],
)
def test_attentions_of_another_kind(config, message):
    """They would see their own patch alone."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    settings = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 8, **blocks, **config}
    denoiser, scheduler = UNet2DConditionModel(**settings), ddim()
    with pytest.raises(ValueError, match=message):
        parallelize(denoiser, patches=2, simulate=True, scheduler=scheduler)
    assert_plain(denoiser, scheduler)


def test_masks_of_adapters():
    sample = Sample("sd15_ip_adapter")
    sample.more["cross_attention_kwargs"] = {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}
    with (
        installed(sample.pipe, patches=2),
        pytest.raises(ValueError, match="ip_adapter_masks lie over the whole picture"),
    ):
        sample()


def test_what_is_for_patches_is_refused_without_them():
    with pytest.raises(ValueError, match=r"mode stale_gn and portion 1\.0 are for patches, and patches is 1"):
        parallelize(build("sd21"), stages=2, mode="stale_gn", simulate=True, scheduler=ddim())
