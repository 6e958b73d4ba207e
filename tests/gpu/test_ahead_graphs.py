"""CUDA graphs where steps are computed ahead of the pipeline: several at a time, or all solved together.

All ranks in one process. The ranks themselves, over NCCL: ranks.py, and scripts/benchmark_parallel_in_time.py.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from denoisers import Sampler, build, ddim

from asyncdiff_pl.parallel import TimeParallel, parallelize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_numbers():
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), flags:
        yield


def samples(name, capture, **settings):
    """Latents of two samples, the graphs that there were after each, and the iterations of a solver."""
    denoiser, scheduler = build(name).to(GPU), ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=capture, **settings)
    found, graphs, iterations = [], [], []
    for seed in (1, 2):
        sampler = Sampler(name, seed=seed)
        given = sampler.latents, sampler.condition, sampler.kwargs
        sampler.latents, sampler.condition, sampler.kwargs = tree_map(
            lambda leaf: leaf.to(GPU) if isinstance(leaf, torch.Tensor) else leaf, given
        )
        found.append(sampler(denoiser, scheduler, 7).clone())
        graphs.append(handle.num_graphs)
        iterations.append(handle.solved.iterations if handle.solved else None)
    assert handle.capture_refusal == ""
    handle.remove()
    return found, graphs, iterations


@pytest.mark.parametrize("name", ["sd21", "sdxl", "svd"])
@pytest.mark.parametrize("settings", [{"steps": 2, "warm_up": 2}, {"steps": 4, "warm_up": 1, "cfg": 2}])
def test_one_graph_does_for_exact_steps_and_those_ahead(name, settings):
    expected, none, _ = samples(name, False, **settings)
    found, graphs, _ = samples(name, True, **settings)
    assert (none, graphs) == ([0, 0], [1, 1])
    for pair in zip(found, expected, strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("name", ["sd21", "svd"])
@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"ranks": 3, "method": "picard", "tolerance": 0.0}])
def test_all_sizes_of_batches_are_recorded_in_the_first_sample(name, settings):
    expected, _, iterations = samples(name, False, time=TimeParallel(**settings))
    found, graphs, same = samples(name, True, time=TimeParallel(**settings))
    assert same == iterations == [[6], [6]]
    assert graphs[0] == graphs[1] > 3
    # batches are filled up to sizes of which there are few
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
