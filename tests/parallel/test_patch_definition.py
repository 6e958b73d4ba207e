"""`parallelize(patches=…, simulate=True)` against the definition of patch parallelism.

In double precision: the variances of `corrected_async_gn` come near to nothing here, and there its definition makes
rounding a million times larger.
"""

import functools

import pytest
import torch
from denoisers import Sampler, build, ddim, deviation_error
from patch_definition import PatchDefinition
from torch import nn
from torch.utils._pytree import tree_map

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.patches.settings import MODES

BOUND = 1e-5
"""Largest difference, relative to what patches deviate from the exact result: that is 3 to 6 % of the latents here."""
STEPS, COLUMNS = 3, 8
STALE = [mode for mode in MODES if mode != "full_sync"]


@functools.cache
def denoiser_of(name: str) -> nn.Module:
    return nn.Module.to(build(name), torch.float64)


def sampler_of(name: str, rows: int) -> Sampler:
    """Pictures that are as narrow as they may be."""
    sampler = Sampler(name, size=rows)
    sampler.latents = sampler.latents[..., :COLUMNS].double()
    sampler.kwargs = tree_map(torch.Tensor.double, sampler.kwargs)
    if sampler.condition is not None:
        sampler.condition = sampler.condition[..., :COLUMNS].double()
    return sampler


@functools.cache
def exact(name: str, rows: int) -> torch.Tensor:
    return sampler_of(name, rows)(denoiser_of(name), steps=STEPS)


def simulated(name: str, rows: int, patches: int, mode: str, portion: float = 1.0, warm_up: int = 1) -> torch.Tensor:
    denoiser, scheduler = denoiser_of(name), ddim()
    settings = {"patches": patches, "mode": mode, "portion": portion, "warm_up": warm_up}
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    try:
        return sampler_of(name, rows)(denoiser, scheduler, STEPS)
    finally:
        handle.remove()


@functools.cache
def defined(name: str, shares: tuple[int, ...], mode: str, portion: float = 1.0, warm_up: int = 1) -> torch.Tensor:
    definition = PatchDefinition(denoiser_of(name), shares, COLUMNS, mode, warm_up, portion)
    try:
        return sampler_of(name, sum(shares))(definition, steps=STEPS)
    finally:
        definition.close()


# model, rows of each patch, mode, portion: every mode on two kinds, then more patches, uneven shares and portions
CASES = [("sd15", (16, 8), mode, 1.0) for mode in ("corrected_async_gn", "sync_gn", "naive")]
CASES += [("sdxl", (8, 4), mode, 1.0) for mode in ("stale_gn", "separate_gn", "no_sync")]
CASES += [("svd", (8, 8), mode, 1.0) for mode in ("stale_gn", "separate_gn", "naive")]
CASES += [("animatediff", (8, 8), mode, 1.0) for mode in ("corrected_async_gn", "sync_gn", "no_sync")]
CASES += [
    ("sd21", (8, 8, 8), "corrected_async_gn", 1.0),
    ("sd21", (16, 8, 8), "stale_gn", 0.3),
    ("sd15", (8, 8, 8), "naive", 1.0),
    ("sdxl", (8, 4, 4), "no_sync", 0.5),
    ("sdxl", (8, 8, 4, 4), "separate_gn", 0.3),
    ("svd", (8, 8, 8), "sync_gn", 0.3),
    ("svd", (16, 8), "corrected_async_gn", 0.5),
    ("animatediff", (16, 8), "stale_gn", 0.5),
]
CASES += [("sdxl", (12, 8), "corrected_async_gn", portion) for portion in (0, 0.3, 0.5)]


@pytest.mark.parametrize(("name", "shares", "mode", "portion"), CASES)
def test_simulation_keeps_to_the_definition(name, shares, mode, portion):
    found = simulated(name, sum(shares), len(shares), mode, portion)
    assert deviation_error(found, defined(name, shares, mode, portion), exact(name, sum(shares))) < BOUND


def test_every_mode_is_on_two_kinds():
    assert all(len({name for name, _, own, _ in CASES if own == mode}) >= 2 for mode in STALE)


def test_warm_up_counts_exact_steps():
    found, expected = simulated("sdxl", 20, 2, "stale_gn", 1.0, 2), defined("sdxl", (12, 8), "stale_gn", 1.0, 2)
    # the last step alone deviates, and little: its rounding is less
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_the_definition_is_exact_where_it_says_so():
    assert torch.equal(defined("sdxl", (12, 8), "full_sync"), exact("sdxl", 20))
    assert torch.equal(defined("sdxl", (12, 8), "stale_gn", warm_up=STEPS), exact("sdxl", 20))


@pytest.mark.parametrize(
    "change",
    [
        *({"mode": mode} for mode in STALE if mode != "corrected_async_gn"),
        *({"portion": portion} for portion in (0, 0.3, 0.5)),
        {"warm_up": 2},
        {"shares": (8, 12)},
    ],
)
def test_another_setting_is_seen(change):
    """What it changes is far above the bound: a simulation that plays another one is caught."""
    settings = {"name": "sdxl", "shares": (12, 8), "mode": "corrected_async_gn"}
    found, expected = defined(**settings | change), defined(**settings)
    assert deviation_error(found, expected, exact("sdxl", 20)) > 1000 * BOUND
