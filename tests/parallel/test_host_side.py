"""No pipeline makes the CPU wait within its loop: on a device where that raises (far_device.py).

tests/gpu/test_no_sync.py says the same of a GPU.
"""

import contextlib
import dataclasses
import inspect

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from far_device import Far, FarDevice, WaitsError, near
from loops import in_loop
from PIL import Image
from tiny_pipelines import KINDS, Sample
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from asyncdiff_pl.models import VideoPredictor
from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.stages.program import Program

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # modules are cast to what they are
    pytest.mark.filterwarnings("ignore:There are modules"),
]

WAITING = {
    "dit": "pipeline_dit.py",
}
"""Pipelines that upload each timestep themselves, within the loop, out of anyone's reach: and where they do it."""


@contextlib.contextmanager
def on_device(pipe):
    """A device with all parts of a pipeline, watched within the pipeline's loop."""
    with FarDevice() as device:
        for part in vars(pipe).values():
            if isinstance(part, nn.Module):
                device.put(part)
        in_loop(pipe, device.watch)
        yield device


def sample_on(name, device):
    """A pipeline whose inputs are on the device."""
    sample = Sample(name)
    own = sample.kind.inputs
    sample.kind = dataclasses.replace(sample.kind, inputs=lambda *args: device.put(own(*args)))
    sample.more = {key: device.put(value) for key, value in sample.more.items()}
    return sample


# what has schedulers, calls or arguments of its own
CASES = ["sd15_pndm", "img2img_heun", "sd3_skips_layers", "sd15_guidance_ends", "controlnet_guesses", "flux_ip_adapter"]


@pytest.mark.parametrize("name", [*KINDS, *CASES])
def test_no_loop_waits(name):
    expected = Sample(name)()
    device = FarDevice()
    sample = sample_on(name, device)
    with on_device(sample.pipe) as device:
        handle = parallelize(sample.pipe)
        waits = pytest.raises(WaitsError) if name in WAITING else contextlib.nullcontext()
        with waits as raised:
            found = near(sample())
        handle.remove()
    if name in WAITING:
        assert any(WAITING[name] in str(entry.path) for entry in raised.traceback)
    else:
        # another device sums in another order
        assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", ["sd15", "sd3", "controlnet", "sd15_pndm"])
def test_without_it_the_loop_waits(name):
    sample = sample_on(name, FarDevice())
    with on_device(sample.pipe), pytest.raises(WaitsError):
        sample()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd15", {"stages": 2, "warm_up": 2, "refresh_every": 2}),
        ("sd15_heun", {"stages": 2, "stride": 2, "warm_up": 1, "time_shift": True}),
        ("controlnet", {"stages": 3, "warm_up": 1, "time_shift": True}),
        ("sd3", {"stages": 2, "stride": 2, "warm_up": 1, "cfg": 2, "time_shift": True}),
        ("flux_true_cfg", {"stages": 2, "warm_up": 2, "time_shift": True}),
    ],
)
def test_no_stage_waits(name, settings, monkeypatch):
    plain = Sample(name)
    handle = parallelize(plain.pipe, simulate=True, **settings)
    expected = plain()
    handle.remove()

    make = Program.make

    def traced(*args, **kwargs):
        # the twin is on "meta" indeed, and knows nothing of this device
        with _disable_current_modes():
            args, kwargs = tree_map(lambda x: x.near.to("meta") if isinstance(x, Far) else x, (args, kwargs))
            return make(*args, **kwargs)

    monkeypatch.setattr(Program, "make", traced)
    # autocast knows nothing of this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    sample = sample_on(name, FarDevice())
    handle = parallelize(sample.pipe, simulate=True, **settings)
    with on_device(sample.pipe):
        found = near(sample())
    assert handle.asynchronous_steps > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    handle.remove()


def load_video(folder):
    pipe = VideoPredictor(folder, dtype="float32").load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def video(small_svd):
    return load_video(small_svd)


def film(pipe, **changes):
    settings = {"height": 64, "width": 64, "num_frames": 2, "num_inference_steps": 2, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipe(Image.new("RGB", (64, 64), (90, 40, 160)), generator=generator, **settings | changes).frames.clone()


def test_the_loop_of_videos_does_not_wait_either(video):
    expected = film(video)
    with on_device(video):
        with pytest.raises(WaitsError):
            film(video)
        handle = parallelize(video)
        found = near(film(video))
        handle.remove()
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_videos_are_the_same_to_the_bit_and_removal_leaves_nothing(video, scale):
    expected, before = film(video, max_guidance_scale=scale), set(vars(video))
    handle = parallelize(video)
    assert torch.equal(film(video, max_guidance_scale=scale), expected)
    # what others see of the pipeline is as it was
    assert isinstance(video, StableVideoDiffusionPipeline)
    assert type(video).__name__ == "StableVideoDiffusionPipeline"
    assert inspect.signature(type(video).__call__) == inspect.signature(StableVideoDiffusionPipeline.__call__)
    handle.remove()
    assert type(video) is StableVideoDiffusionPipeline
    assert set(vars(video)) == before
    assert not video.unet._forward_pre_hooks
    assert {"step", "set_timesteps"}.isdisjoint(vars(video.scheduler))
    assert torch.equal(film(video, max_guidance_scale=scale), expected)


def test_another_guidance_scale_is_another_answer(video):
    """As callbacks set it in mid-run."""
    handle = parallelize(video)
    for scale, is_guided in [(torch.tensor([[0.0, 3.0]]), True), (torch.tensor([[0.0, 1.0]]), False), (2.0, True)]:
        video._guidance_scale = scale
        assert video.guidance_scale is scale
        assert video.do_classifier_free_guidance is is_guided
    handle.remove()
    assert video.guidance_scale == 2.0
    assert video.do_classifier_free_guidance is True
