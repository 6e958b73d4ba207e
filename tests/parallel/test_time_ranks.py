"""Parallel in time on ranks, over gloo: each scenario gives to the bit what all ranks in one process give.

Processes are dear: one world of 4 ranks, in which all scenarios are played.
"""

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from ranks import run_four_ranks
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import TimeParallel, parallelize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def samples(name, simulate, seeds=(5,), num_steps=6, scheduler=None, capture=False, batch=1, **settings):
    """Some samples with one handle, and their iterations."""
    denoiser, scheduler = build(name), scheduler or ddim()
    time = TimeParallel(**{"ranks": 4, "tolerance": 1e-2, **settings})
    handle = parallelize(denoiser, time=time, simulate=simulate, scheduler=scheduler, capture=capture)
    found = []
    for seed in seeds:
        found.append(Sampler(name, seed=seed, batch=batch)(denoiser, scheduler, num_steps))
        found.append(torch.tensor(handle.solved.iterations))
    handle.remove()
    return found


def videos(simulate, ranks=4):
    """5 states are two halves each: shares of 3, 3, 2 and 2."""
    return samples("svd", simulate, scheduler=diffusers.EulerDiscreteScheduler(), ranks=ranks)


def batches(simulate, ranks=4):
    return samples("sd21", simulate, seeds=(1, 2), batch=2, method="picard", window=4, ranks=ranks)


def more_ranks_than_work(simulate, ranks=4):
    """Shares of 1, 1, 0 and 0 in the end."""
    return samples("sd21", simulate, num_steps=3, tolerance=0.0, ranks=ranks)


def noise_of_the_process(simulate):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return samples("sd21", simulate, scheduler=diffusers.DDPMScheduler(clip_sample=False))


def recorded(simulate):
    """Each rank records for itself: they have batches of different sizes."""
    with captured(FakeRecorder()) as recorder:
        found = samples("sd21", simulate, seeds=(1, 2), capture=True)
    assert recorder.replays > 0
    return found


def pipelines(simulate):
    found = []
    for name in ("dit",):
        sample = Sample(name)
        handle = parallelize(sample.pipe, time=TimeParallel(ranks=4), simulate=simulate)
        found.append(sample())
        handle.remove()
    return found


def group(number, simulate):
    """Two groups of two ranks have samples of their own, the second one more than the first."""
    return samples("sd21", simulate, seeds=range(10 * number, 10 * number + 1 + number), ranks=2)


SCENARIOS = [videos, batches, more_ranks_than_work, noise_of_the_process, recorded, pipelines]


# -- what is no comparison ---------------------------------------------------------------------------------------------


def calls_and_bytes(rank):
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, time=TimeParallel(ranks=4, tolerance=0.0), scheduler=scheduler)
    sizes = []
    denoiser.conv_in.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    Sampler("sd21")(denoiser, scheduler, 6)
    # the exact step, then shares of 10, 8, 6, 4 and 2 items
    first = rank < 2
    assert sizes == [2, *([3, 2, 2, 1, 1] if first else [2, 2, 1, 1])]
    # what a rank made goes to the three others, filled up to the largest share
    assert handle.sent_bytes == 3 * (3 + 2 + 2 + 1 + 1) * (4 * 8 * 8 * 4)
    handle.remove()


def ranks_with_other_noise(rank):
    denoiser, scheduler = build("sd21"), diffusers.DDPMScheduler(clip_sample=False)
    handle = parallelize(denoiser, time=TimeParallel(ranks=4), scheduler=scheduler)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match=r"drifted apart in the first 1 steps.*`generator=`"):
        Sampler("sd21")(denoiser, scheduler, 6)
    handle.remove()


def test_ranks():
    expected = run_four_ranks(SCENARIOS, group, [calls_and_bytes, ranks_with_other_noise])
    # one rank has other batches, and so other roundings; it comes to the same
    for scenario in (videos, batches, more_ranks_than_work):
        found, alone = expected[scenario.__name__], scenario(simulate=True, ranks=1)
        for at in range(0, len(found), 2):
            assert torch.equal(found[at + 1], alone[at + 1])
            assert float((found[at] - alone[at]).norm() / alone[at].norm()) < 1e-5
