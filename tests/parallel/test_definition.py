"""`parallelize(simulate=True)` against the definition of the schedule."""

import functools

import pytest
import torch
from cuts import ORIGINAL, split_attentions
from definition import Definition
from denoisers import Sampler, build, ddim, deviation_error

from asyncdiff_pl.parallel import parallelize

BOUND = 1e-5

# model, cut, stages, stride, warm_up, time_shift
CASES = [
    ("sdxl", "original", 3, 1, 3, True),
    ("sdxl", "original", 4, 2, 3, False),
    ("sdxl", "found", 2, 2, 2, True),
    ("sdxl", "found", 5, 1, 1, False),
    ("sdxl", "split", 3, 1, 2, True),
    ("sdxl", "split", 3, 2, 3, False),
    ("sd15", "original", 2, 2, 2, False),
    ("sd15", "original", 4, 1, 3, True),
    ("sd15", "found", 8, 1, 1, False),
    ("sd21", "original", 3, 1, 2, False),
    ("sd21", "found", 4, 2, 1, True),
    ("svd", "original", 2, 1, 2, True),
    ("svd", "original", 3, 2, 3, False),
    ("svd", "found", 3, 1, 1, False),
    ("animatediff", "original", 3, 2, 3, True),
    ("animatediff", "found", 2, 1, 2, False),
]
STEPS = 7

denoiser_of = functools.cache(build)


@functools.cache
def exact(name: str) -> torch.Tensor:
    return Sampler(name)(denoiser_of(name), steps=STEPS)


@pytest.mark.parametrize(("name", "kind", "stages", "stride", "warm_up", "time_shift"), CASES)
def test_simulation_keeps_to_the_definition(name, kind, stages, stride, warm_up, time_shift):
    denoiser, sampler = denoiser_of(name), Sampler(name)
    cut = {"original": ORIGINAL.get((name, stages)), "split": split_attentions(stages), "found": None}[kind]
    settings = {"stride": stride, "warm_up": warm_up, "time_shift": time_shift}
    scheduler = ddim()
    handle = parallelize(
        denoiser, stages=stages, cut=cut, folded=cut is None, simulate=True, scheduler=scheduler, **settings
    )
    try:
        found = sampler(denoiser, scheduler, STEPS)
    finally:
        handle.remove()
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    definition = Definition(denoiser, cut or handle.cut, scheduler.timesteps, **settings)
    try:
        expected = sampler(definition, scheduler, STEPS)
    finally:
        definition.close()
    assert len(handle.cut) == stages
    assert deviation_error(found, expected, exact(name)) < BOUND


@pytest.mark.parametrize(
    ("stages", "stride", "warm_up", "time_shift", "refresh_every", "refreshes"),
    [
        (2, 1, 1, False, 3, (3, 6)),
        (3, 1, 2, True, 2, (3, 5, 7)),
        (2, 2, 1, False, 4, (4, 8)),
        (3, 2, 2, True, 3, (4, 7)),
    ],
)
def test_refreshes(stages, stride, warm_up, time_shift, refresh_every, refreshes):
    """The first asynchronous step after one begins a round anew."""
    denoiser, sampler, scheduler = denoiser_of("sd21"), Sampler("sd21"), ddim()
    settings = {"stride": stride, "warm_up": warm_up, "time_shift": time_shift}
    handle = parallelize(
        denoiser, stages=stages, refresh_every=refresh_every, simulate=True, scheduler=scheduler, **settings
    )
    try:
        found = sampler(denoiser, scheduler, 9)
        assert handle.exact_steps == warm_up + len(refreshes)
    finally:
        handle.remove()
    scheduler = ddim()
    scheduler.set_timesteps(9)
    definition = Definition(denoiser, handle.cut, scheduler.timesteps, refreshes=refreshes, **settings)
    try:
        expected = sampler(definition, scheduler, 9)
    finally:
        definition.close()
    assert deviation_error(found, expected, sampler(denoiser, ddim(), 9)) < BOUND


def test_found_cuts_split_attentions_and_fold():
    """The cases above see both in a found cut: a stage with both ends, and an attention of several stages."""
    denoiser, scheduler = denoiser_of("sdxl"), ddim()
    handle = parallelize(denoiser, stages=5, folded=True, simulate=True, scheduler=scheduler)
    Sampler("sdxl")(denoiser, scheduler, steps=1)
    handle.remove()
    owners = {name: stage for stage, names in enumerate(handle.cut) for name in names}
    assert owners["conv_in"] == owners["conv_out"] == 4
    assert any(".transformer_blocks." in name for name in owners)
