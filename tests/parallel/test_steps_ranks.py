"""Step parallelism on ranks, over gloo: each scenario gives to the bit what all ranks in one process give.

Processes are dear: one world of 4 ranks, in which all scenarios are played.
"""

import contextlib

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from ranks import run_four_ranks
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import parallelize


def samples(name, simulate, seeds=(5,), num_steps=7, scheduler=None, **settings):
    """Some samples with one handle."""
    denoiser, scheduler = build(name), scheduler or ddim()
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    found = [Sampler(name, seed=seed)(denoiser, scheduler, num_steps) for seed in seeds]
    handle.remove()
    return found


def four_steps(simulate):
    """6 steps are left after warm-up: two ranks have nothing to do in the last round."""
    return samples("svd", simulate, scheduler=diffusers.DPMSolverMultistepScheduler(), steps=4, warm_up=1)


def noise_of_the_process(simulate):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        scheduler = diffusers.EulerAncestralDiscreteScheduler()
        return samples("sd21", simulate, seeds=(1, 2), scheduler=scheduler, steps=4, warm_up=2)


def halves(simulate):
    return samples("animatediff", simulate, steps=2, warm_up=2, cfg=2)


def recorded(simulate):
    """Replays, with messages between them: in a world where the last round leaves ranks idle, and with halves."""
    found = []
    for name, settings in (("sd21", {"steps": 4, "warm_up": 1}), ("svd", {"steps": 2, "warm_up": 2, "cfg": 2})):
        with contextlib.nullcontext() if simulate else captured(FakeRecorder()) as recorder:
            found += samples(name, simulate, seeds=(1, 2), capture=not simulate, **settings)
        assert simulate or recorder.replays > 0
    return found


def pipelines(simulate):
    """Guidance ends within a round, and in another sample between two; two calls a step."""
    found = []
    for name, settings in (
        ("sd15_guidance_ends", {"steps": 2, "cfg": 2, "warm_up": 2}),
        ("sd15_guidance_ends", {"steps": 4, "warm_up": 1}),
        ("flux_true_cfg", {"steps": 4, "warm_up": 1}),
    ):
        sample = Sample(name)
        handle = parallelize(sample.pipe, simulate=simulate, **settings)
        found.append(sample())
        handle.remove()
    return found


def group(number, simulate):
    """Two groups of two ranks have samples of their own, the second one more than the first."""
    return samples("sd21", simulate, seeds=range(10 * number, 10 * number + 1 + number), steps=2, warm_up=2)


SCENARIOS = [four_steps, noise_of_the_process, halves, recorded, pipelines]


# -- what is no comparison ---------------------------------------------------------------------------------------------


def calls_and_bytes(rank):
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, steps=4, warm_up=1, scheduler=scheduler)
    calls = []
    denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    Sampler("sd21")(denoiser, scheduler, 7)
    # the exact step, one of a round of four, and for two ranks one of a round of two
    assert len(calls) == (3 if rank < 2 else 2)
    assert (handle.exact_steps, handle.asynchronous_steps) == (1, 6)
    # what a rank made goes to the three others: 2 halves, 4 channels, 8 x 8
    assert handle.sent_bytes == (len(calls) - 1) * 3 * (2 * 4 * 8 * 8 * 4)
    handle.remove()


def ranks_with_other_noise(rank):
    denoiser, scheduler = build("sd21"), diffusers.EulerAncestralDiscreteScheduler()
    handle = parallelize(denoiser, steps=4, warm_up=2, scheduler=scheduler)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match=r"drifted apart in the first 2 steps.*`generator=`"):
        Sampler("sd21")(denoiser, scheduler, 6)
    handle.remove()


@pytest.mark.filterwarnings("ignore:The denoiser's inputs changed", "ignore::DeprecationWarning")
def test_ranks():
    run_four_ranks(SCENARIOS, group, [calls_and_bytes, ranks_with_other_noise])
