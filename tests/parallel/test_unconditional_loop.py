"""The loop of DDPMs' pictures as it runs on a GPU: its steps are recorded and replayed, and the CPU never waits."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from fake_graph import FakeRecorder, captured
from far_device import WaitsError, near
from test_host_side import on_device

from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.sampling.respaced import RespacedScheduler

CASES = [{}, {"sampler": "ddpm", "skip": "quadratic"}]


def build(settings):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=None,
    )
    pipeline = UnconditionalPipeline(network.eval(), RespacedScheduler.like(DDPMScheduler(), **settings))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_steps_are_replayed(settings):
    pipeline = build(settings)
    expected = [pipeline(seeds, 5, "pt").images for seeds in ([1, 2], [3, 4])]
    with captured(FakeRecorder()) as recorder:
        handle = parallelize(pipeline, capture=True)
        found = [pipeline(seeds, 5, "pt").images for seeds in ([1, 2], [3, 4])]
        assert handle.capture_refusal == ""
        handle.remove()
    # of the ten steps those before the recording run as they are
    assert recorder.replays >= 8
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_loop_does_not_wait(settings):
    expected = build(settings)([1, 2], 5, "pt").images
    pipeline = build(settings)
    with on_device(pipeline):
        # its timesteps are on the CPU
        with pytest.raises(WaitsError):
            pipeline([1, 2], 5, "pt")
        handle = parallelize(pipeline)
        found = near(pipeline([1, 2], 5, "pt").images)
        handle.remove()
    assert float((found - expected).abs().max()) < 1e-4
