"""No pipeline's loop makes the CPU wait for the GPU, as torch itself watches it; exceptions are in `WAITING`.

tests/parallel/test_host_side.py says the same on a machine without a GPU, and test_timetable.py of the schedulers.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from loops import in_loop
from test_host_side import CASES, WAITING, film, load_video
from tiny_pipelines import KINDS, Sample

from asyncdiff_pl.parallel import parallelize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WAITS = "synchronizing CUDA operation"


@contextlib.contextmanager
def watched():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def to_gpu(value):
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, value)


def move(pipe):
    for part in vars(pipe).values():
        if isinstance(part, nn.Module):
            part.cuda()


def sample_on_gpu(name):
    sample = Sample(name)
    own = sample.kind.inputs
    sample.kind = dataclasses.replace(sample.kind, inputs=lambda *args: to_gpu(own(*args)))
    sample.more = to_gpu(sample.more)
    move(sample.pipe)
    return sample


ROWS = [(name, {}) for name in (*KINDS, *CASES)]
ROWS += [
    ("sd15", {"stages": 2, "warm_up": 2, "refresh_every": 2}),
    ("sd15_heun", {"stages": 2, "stride": 2, "warm_up": 1, "time_shift": True}),
    ("controlnet", {"stages": 3, "warm_up": 1, "time_shift": True}),
    ("sd3", {"stages": 2, "stride": 2, "warm_up": 1, "cfg": 2, "time_shift": True}),
    ("flux_true_cfg", {"stages": 2, "warm_up": 2, "time_shift": True}),
    ("sdxl", {"stages": 2, "warm_up": 1, "capture": True}),
    ("sdxl", {"capture": True}),
    ("sdxl", {"patches": 2, "mode": "corrected_async_gn", "portion": 0.3, "warm_up": 2}),
    ("controlnet", {"patches": 2}),
    ("sdxl", {"patches": 2, "mode": "stale_gn", "warm_up": 1, "capture": True}),
]


@pytest.mark.parametrize(("name", "settings"), ROWS)
@torch.no_grad()
def test_no_loop_waits(name, settings):
    sample = sample_on_gpu(name)
    handle = parallelize(sample.pipe, simulate=True, **settings)
    # what is made once, libraries' workspaces and recordings among it, may wait
    expected = sample()
    in_loop(sample.pipe, watched)
    if name in WAITING:
        with pytest.raises(RuntimeError, match=WAITS) as raised:
            sample()
        assert any(WAITING[name] in str(entry.path) for entry in raised.traceback)
    else:
        found = sample()
        assert float((found - expected).norm() / expected.norm()) < 1e-4
    handle.remove()


@pytest.mark.parametrize("name", ["sd15", "sd3", "controlnet"])
@torch.no_grad()
def test_without_it_the_loop_waits(name):
    sample = sample_on_gpu(name)
    in_loop(sample.pipe, watched)
    with pytest.raises(RuntimeError, match=WAITS):
        sample()


@torch.no_grad()
def test_the_loop_of_videos_does_not_wait_either(small_svd):
    pipe = load_video(small_svd)
    move(pipe)
    handle = parallelize(pipe)
    expected = film(pipe)
    in_loop(pipe, watched)
    found = film(pipe)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    handle.remove()
    with pytest.raises(RuntimeError, match=WAITS):
        film(pipe)
