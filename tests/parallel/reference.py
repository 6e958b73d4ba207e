"""Latents of the original AsyncDiff, where they are at hand, and the same sample in this package."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuts import ORIGINAL
from torch import nn

from asyncdiff_pl.parallel import parallelize

FOLDER = Path(__file__).parents[2] / ".." / "shared" / "reference"
BOUND = 1e-4
"""Largest difference between two deviations from the sequential result, relative to the deviation."""


@functools.cache
def latents() -> dict[str, torch.Tensor]:
    """All reference latents by key; empty where the file is absent."""
    file = FOLDER / "asyncdiff_latents.npz"
    if not file.exists():
        return {}
    with np.load(file) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def keys(ranks: int | None = None) -> list[str]:
    """Keys of asynchronous runs, all or those that take a number of ranks."""
    found = [key for key in latents() if "/n" in key]
    return [key for key in found if ranks in (None, settings(key)["stages"] + settings(key)["stride"] - 1)]


def settings(key: str) -> dict[str, Any]:
    """What `parallelize` is given for a key."""
    name, stages, stride, warm_up, shift = re.fullmatch(r"(\w+)/n(\d)s(\d)w(\d)t(\d)", key).groups()
    given = {"stages": int(stages), "stride": int(stride), "warm_up": int(warm_up), "time_shift": shift == "1"}
    return given | {"cut": ORIGINAL[name, int(stages)]}


@functools.cache
def tiny() -> Any:
    """The module with the denoisers that the latents were made with."""
    spec = importlib.util.spec_from_file_location("tiny_denoisers", FOLDER / "tiny_denoisers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def denoiser(name: str) -> nn.Module:
    """The denoiser of a model."""
    return tiny().build(name)


@functools.cache
def sequential(name: str) -> torch.Tensor:
    """The exact result on this machine."""
    return tiny().loop(denoiser(name), name, tiny().scheduler(name))


def run(key: str, simulate: bool) -> torch.Tensor:
    """One sample as a key says; in one process after another one, of another length, with the same handle."""
    name = key.split("/")[0]
    scheduler = tiny().scheduler(name)
    handle = parallelize(denoiser(name), simulate=simulate, scheduler=scheduler, **settings(key))
    try:
        if simulate:
            tiny().loop(denoiser(name), name, scheduler, steps=settings(key)["warm_up"] + 1)
        return tiny().loop(denoiser(name), name, scheduler)
    finally:
        handle.remove()


simulated = functools.cache(functools.partial(run, simulate=True))
"""The sample with all ranks in this process."""
