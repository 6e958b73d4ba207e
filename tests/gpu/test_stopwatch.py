"""Times of pieces on a GPU: the GPU's own, not those of the CPU that launches kernels."""

import time
import warnings

import pytest
import torch
from torch import nn

from asyncdiff_pl.parallel.stages.stopwatch import stopwatch_for

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


def test_what_cannot_be_recorded_is_timed_as_it_is(device):
    stopwatch = stopwatch_for(device)
    numbers = torch.randn(1000, device=device)
    with pytest.warns(UserWarning, match="syncs cannot be recorded as a CUDA graph"):
        assert stopwatch("syncs", lambda: numbers.nonzero()) > 0
    # the next one can be
    with torch.no_grad():
        assert stopwatch("sum", lambda: numbers.sum()) > 0
