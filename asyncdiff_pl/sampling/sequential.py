"""One step after the other: what the solvers that are parallel in time converge to."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncdiff_pl.sampling.coefficients import StepCoefficients
from asyncdiff_pl.sampling.noises import added_noises
from asyncdiff_pl.sampling.solution import Denoise, Solution


@torch.no_grad()
def sequential(
    denoise: Denoise, latents: Tensor, coefficients: StepCoefficients, *, noises: Tensor | None = None
) -> Solution:
    """Takes the scheduler's steps in order; an iteration is a step.

    Args:
        denoise: Evaluates the denoiser.
        latents: The noise that a pipeline begins with, [B, ...].
        coefficients: The scheduler's N steps.
        noises: Unit noises [B, N, ...], if steps add any.

    Returns:
        The solution; its residuals are zeros, since nothing is iterated.
    """
    batch, number = len(latents), len(coefficients)
    added = added_noises(coefficients, noises, latents)
    coefficients = coefficients.to(latents.device)
    state = latents.double() * coefficients.initial_scale
    states = [state]
    for step in reversed(range(number)):
        one = slice(step, step + 1)
        outputs = denoise(
            state.to(latents.dtype), coefficients.timesteps[one].repeat(batch), [*range(batch)], [step] * batch
        )
        estimates = coefficients.noise_estimates(outputs, state, one)
        state = coefficients.state_factors[step] * state + coefficients.estimate_factors[step] * estimates
        if added is not None:
            state = state + added[:, step]
        states.append(state)
    evaluated = torch.full((number, number), torch.nan).fill_diagonal_(0).flip(0)
    return Solution(
        latents=(state * coefficients.final_scale).to(latents.dtype),
        trajectory=torch.stack(states[::-1], dim=1).to(latents.dtype),
        iterations=[number] * batch,
        evaluations=[number] * batch,
        finished=[0] * batch,
        residuals=[evaluated] * batch,
    )
