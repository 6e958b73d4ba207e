"""Blocks that Inductor compiles for a GPU, with NHWC weights, by themselves and in CUDA graphs."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from denoisers import Sampler, ddim
from test_compiling import build_small

from asyncdiff_pl.parallel import parallelize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def full_precision():
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = allowed


def samples(denoiser, capture=False, **settings):
    """Latents of three samples, and the handle."""
    scheduler, sampler = ddim(), Sampler("sd21", size=16)
    sampler.latents = sampler.latents.cuda()
    sampler.kwargs = {name: value.cuda() for name, value in sampler.kwargs.items()}
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=capture, **settings)
    return [sampler(denoiser, scheduler, 5) for _ in range(3)], handle


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("settings", [{}, {"stages": 2, "warm_up": 2}])
def test_compiled_and_recorded(settings):
    """Compiled code rounds otherwise than eager code, and as a graph it does what it does without."""
    plain = samples(build_small().cuda(), **settings)[0]
    compiled = samples(build_small().cuda(), compile="blocks", **settings)[0]
    recorded, handle = samples(build_small().cuda(), compile="blocks", capture=True, **settings)
    assert handle.num_graphs > 0
    for one, two, three in zip(plain, compiled, recorded, strict=True):
        assert distance(two, one) < 1e-3
        assert distance(three, two) < 1e-6


def test_the_whole_denoiser_compiled_and_recorded():
    plain = samples(build_small().cuda())[0]
    recorded, handle = samples(build_small().cuda(), compile="full", capture=True)
    assert handle.num_graphs > 0
    assert all(distance(found, expected) < 1e-3 for found, expected in zip(recorded, plain, strict=True))


def test_weights_are_nhwc_while_it_is_there():
    denoiser, fresh = build_small().cuda(), build_small().cuda()
    _, handle = samples(denoiser, compile="blocks")
    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.permute(0, 2, 3, 1).is_contiguous()
    handle.remove()
    for before, after in zip(fresh.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()
