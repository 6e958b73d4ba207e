"""Times of pieces on a GPU: the GPU's own, not those of the CPU that launches kernels."""

import time
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asyncdiff_pl.parallel.stages.costs import measure
from asyncdiff_pl.parallel.stages.stopwatch import stopwatch_for
from asyncdiff_pl.parallel.stages.units import meta_twin, trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_launches_do_not_count(device):
    stopwatch = stopwatch_for(device)
    small = nn.Linear(64, 64, device=device)
    given = torch.randn(64, 64, device=device)

    def run():
        time.sleep(0.001)
        small(given)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 500 < stopwatch("small", run) < 100_000


def test_twice_the_work_takes_about_twice_as_long(device):
    stopwatch = stopwatch_for(device)
    left = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    with torch.no_grad():
        once = stopwatch("once", lambda: left @ left)
        twice = stopwatch("twice", lambda: left @ left @ left)
    assert 1.7 < twice / once < 2.3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_units_of_a_denoiser_add_up_to_it(device, mode):
    # each mode follows the other: what one notes must be writable in the other
    with torch.device(device):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=64, attention_head_dim=8).half().eval()
        latents, texts = torch.randn(2, 4, 64, 64).half(), torch.randn(2, 77, 64).half()
        args, kwargs = (latents, torch.tensor(7)), {"encoder_hidden_states": texts}
    graph = trace(meta_twin(denoiser), args, kwargs, latents)
    stopwatch = stopwatch_for(device)
    for kind in (mode, torch.no_grad):
        with kind(), warnings.catch_warnings():
            warnings.simplefilter("error")
            costs = measure(denoiser, denoiser.forward, graph, args, kwargs, stopwatch)
            whole = stopwatch("whole", lambda: denoiser(*args, **kwargs))
        assert min(costs) > 0
        assert 0.85 < sum(costs) / whole < 1.15


def test_what_cannot_be_recorded_is_timed_as_it_is(device):
    stopwatch = stopwatch_for(device)
    numbers = torch.randn(1000, device=device)
    with pytest.warns(UserWarning, match="syncs cannot be recorded as a CUDA graph"):
        assert stopwatch("syncs", lambda: numbers.nonzero()) > 0
    # the next one can be
    with torch.no_grad():
        assert stopwatch("sum", lambda: numbers.sum()) > 0
