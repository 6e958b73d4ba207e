"""Scenarios of test_ranks.py with recorded steps: replays with their messages compute what one process does without."""

import pytest
import torch
from denoisers import Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from relay_scenarios import in_relay
from stage_scenarios import by_need, changes, sample, two_calls_a_step

from asyncdiff_pl.parallel import parallelize


def recorded(scenario, simulate, *args, **settings):
    """A scenario whose steps are replayed on ranks."""
    if simulate:
        return scenario(*args, simulate, **settings)
    with captured(FakeRecorder()) as recorder:
        found = scenario(*args, simulate, capture=True, **settings)
    assert recorder.replays > 0
    return found


def three_samples(name, simulate, **settings):
    return sample(name, simulate, [Sampler(name, seed=seed) for seed in range(3)], **settings)


def recorded_in_two(simulate):
    found = recorded(three_samples, simulate, "sd15", stages=2, warm_up=2)
    return found + recorded(three_samples, simulate, "svd", cfg=2, steps=3)


def recorded_changes(simulate):
    return recorded(changes, simulate, stops=(4,))


def recorded_two_calls_a_step(simulate):
    return recorded(two_calls_a_step, simulate)


def recorded_by_need(simulate):
    return recorded(by_need, simulate)


def recorded_relay(simulate):
    return recorded(three_samples, simulate, "sd21", **in_relay(simulate, stages=2, refresh_every=3))


def recorded_with_an_extra_rank(simulate):
    return recorded(three_samples, simulate, "sd21", stages=2, stride=2, warm_up=2, time_shift=True)


def recorded_in_four(simulate):
    found = recorded(three_samples, simulate, "sd15", stages=2, cfg=2, refresh_every=3)
    return found + recorded(three_samples, simulate, "sd21", stages=4, warm_up=1)


RECORDED = {
    2: [recorded_in_two, recorded_changes, recorded_two_calls_a_step, recorded_by_need, recorded_relay],
    3: [recorded_with_an_extra_rank],
    4: [recorded_in_four],
}

# -- what is no comparison -----------------------------------------------------------------------------------------


def refusal_of_one_rank(rank):
    """The other one goes on without recordings, too: their messages are in recordings of both or of none."""
    expected = sample("sd21", True, stages=2)
    denoiser, scheduler = build("sd21"), ddim()
    if rank == 1:
        # it waits for the device, which cannot be recorded
        denoiser.conv_in.register_forward_pre_hook(lambda module, args: float(args[0].sum()) and None)
    with captured(FakeRecorder()) as recorder, pytest.warns(UserWarning, match="Steps are not captured"):
        handle = parallelize(denoiser, stages=2, scheduler=scheduler, capture=True)
        assert torch.equal(Sampler("sd21")(denoiser, scheduler, 7), expected[0])
    assert handle.capture_refusal.startswith(("another rank of the pipeline cannot", "aten._local_scalar")[rank])
    handle.remove()
    assert recorder.alive == recorder.replays == 0


RECORDED_CHECKS = {2: [refusal_of_one_rank]}
