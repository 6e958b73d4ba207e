"""The steps after an exact one as what solvers take: numbers, the noise that will be drawn, states to begin with.

Sources of the solvers: ParaTAA (arXiv 2402.09970) and ParaDiGMS (arXiv 2305.16317).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from asyncdiff_pl.parallel.steps.twin import with_cloned_generators
from asyncdiff_pl.parallel.time.settings import TimeParallel
from asyncdiff_pl.sampling import (
    Callback,
    Denoise,
    Solution,
    StepCoefficients,
    picard,
    read_coefficients,
    triangular_anderson,
)


def coefficients_of(scheduler: Any, step: dict[str, Any], number: int) -> StepCoefficients:
    """The last steps of a scheduler, as numbers.

    Args:
        scheduler: The scheduler, with its timesteps set.
        step: Arguments by name of one of its steps.
        number: How many.
    """
    takes_eta = "eta" in inspect.signature(type(scheduler).step).parameters
    return read_coefficients(scheduler, step.get("eta", 0.0) if takes_eta else None).last(number)


def as_states(latents: Tensor, scale: Tensor) -> Tensor:
    """Latents of a pipeline in the scale in which a denoiser is given them.

    Args:
        latents: The latents.
        scale: Theirs among `StepCoefficients.latent_scales`.
    """
    return (latents.double() / float(scale)).to(latents.dtype)


def solve_after(
    denoise: Denoise,
    latents: Tensor,
    step: dict[str, Any],
    coefficients: StepCoefficients,
    settings: TimeParallel,
    watcher: Callback | None,
) -> Solution:
    """Solves all steps but the first together.

    Args:
        denoise: Evaluates the denoiser.
        latents: What the first step made of B samples, [B, ...].
        step: Arguments of the scheduler in the first step, by name.
        coefficients: All N steps.
        settings: How steps are solved.
        watcher: Is told of each iteration.

    Returns:
        The solution of N - 1 steps.

    Raises:
        ValueError: The initial trajectory, or the number of steps to solve of it, does not fit N steps.
    """
    number, samples = len(coefficients) - 1, len(latents)
    noises = None
    if coefficients.stochastic:
        noises = _foreseen(step.get("generator"), number, step["model_output"])[:, :samples]
        noises = noises.transpose(0, 1).flip(1)
    trajectory = _initial_trajectory(settings, latents, number + 1)
    variation_steps = None
    if trajectory is not None and settings.variation_steps is not None:
        settings.check_variation_steps(number + 1)
        variation_steps = min(settings.variation_steps, number)
    common = {
        "noises": noises,
        "window": settings.window,
        "tolerance": settings.limit,
        "max_iterations": settings.max_iterations,
        # the first step is exact
        "initial_trajectory": None if trajectory is None else trajectory[:, :-1],
        "variation_steps": variation_steps,
        "callback": watcher,
    }
    remaining = coefficients.last(number)
    if settings.method == "picard":
        return picard(denoise, latents, remaining, **common)
    own = {"order": settings.order, "memory": settings.memory, "safeguard": settings.safeguard}
    return triangular_anderson(denoise, latents, remaining, **own, **common)


def _initial_trajectory(settings: TimeParallel, latents: Tensor, steps: int) -> Tensor | None:
    given = settings.initial_trajectory
    if given is not None and not isinstance(given, Tensor):
        given = given(steps)
    if given is None:
        return None
    expected = (len(latents), steps + 1, *latents.shape[1:])
    if given.shape != expected:
        raise ValueError(
            f"initial_trajectory is {tuple(given.shape)}, but {steps} steps of these latents need {expected}; give "
            "one of a run with as many steps and of the same size."
        )
    return given


def _foreseen(generator: Any, number: int, like: Tensor) -> Tensor:
    """The noise that the next steps of a scheduler will draw, [N, ...] in the scheduler's order; nothing is drawn.

    Args:
        generator: The generator, or one for each sample, that its step is given; None for the process's own.
        number: Steps.
        like: What each step's noise is like.
    """
    given = with_cloned_generators(generator)
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return torch.stack(
            [randn_tensor(like.shape, generator=given, device=like.device, dtype=like.dtype) for _ in range(number)]
        )
