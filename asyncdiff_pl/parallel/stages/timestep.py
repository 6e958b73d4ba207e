"""Giving a denoiser another step's timestep, in the form in which the pipeline gave its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from asyncdiff_pl.parallel.arguments import Arguments
from asyncdiff_pl.parallel.timetable import upload
from asyncdiff_pl.parallel.trajectory import Trajectory

_ROUNDING = 2**-6
"""How far bfloat16 may put the ratio of two numbers off."""


def with_timestep(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trajectory: Trajectory, step: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces the timestep among a denoiser's arguments.

    Args:
        forward: The denoiser's own forward, whose signature names the arguments.
        args: Positional arguments of the call of step `trajectory.position`.
        kwargs: Keyword arguments of that call.
        trajectory: Where the pipeline stands.
        step: Step of the sample whose timestep is given; beyond the last one, the last one's.
    """
    if step == trajectory.position:
        return args, kwargs
    timesteps = trajectory.timesteps
    assert timesteps is not None
    own = timesteps[trajectory.first_index + trajectory.position]
    other = timesteps[min(trajectory.first_index + step, len(timesteps) - 1)]
    arguments = Arguments(forward)
    given = arguments.find((args, kwargs), "timestep")
    if isinstance(given, torch.Tensor):
        near = _on_host(given, trajectory)
        other = other.to(near.device)
        if near.dtype.is_floating_point:
            # rounded first, as pipelines do it; in 16 bits the ratio of two timesteps is rounded too
            other, own = other.to(near.dtype).double(), own.to(near.device, near.dtype).double()
            other = other * _scale(near.double(), own)
        given = upload(other.to(near.dtype).expand(near.shape), given.device)
    else:
        given = type(given)(other.item())
    return arguments.replace((args, kwargs), "timestep", given)


def _on_host(given: torch.Tensor, trajectory: Trajectory) -> torch.Tensor:
    """The timestep of the call in work where the CPU can read it without waiting, if that is known."""
    near = trajectory.host_timestep
    if near is None:
        return given
    # both halves of a guidance batch have the same
    return near if near.shape == given.shape else near[: len(given)]


def _scale(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What a pipeline multiplied a scheduler's timestep by: 1, or 1 / 1000 (FLUX), or anything else."""
    scale = torch.where(own == 0, 1.0, given / own)
    for usual in (1.0, 1e-3):
        scale = torch.where((scale / usual - 1).abs() < _ROUNDING, usual, scale)
    return scale


def without_timestep(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A denoiser's arguments by name, all but the timestep.

    Args:
        forward: The denoiser's own forward, whose signature names the arguments.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    return {name: value for name, value in bound.items() if name != "timestep"}
