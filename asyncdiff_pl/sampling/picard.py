"""ParaDiGMS: Picard iteration over a sliding window of steps.

After Shih et al. (2023), "Parallel Sampling of Diffusion Models", algorithm 1.
"""

from __future__ import annotations

import math

from torch import Tensor

from asyncdiff_pl.sampling.coefficients import StepCoefficients, along
from asyncdiff_pl.sampling.solution import Callback, Denoise, Solution
from asyncdiff_pl.sampling.windows import check_tolerance, solve


def picard(
    denoise: Denoise,
    latents: Tensor,
    coefficients: StepCoefficients,
    *,
    noises: Tensor | None = None,
    window: int | None = None,
    tolerance: float = 0.1,
    max_iterations: int | None = None,
    initial_trajectory: Tensor | None = None,
    variation_steps: int | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Solves all steps together: a state is the window's first plus all that the steps between change.

    An iteration is one evaluation of the denoiser on every sample's window; it finishes at least one state, so that N
    always suffice, and a tolerance of 0 gives the sequential result.

    Args:
        denoise: Evaluates the denoiser.
        latents: The noise that a pipeline begins with, [B, ...].
        coefficients: The scheduler's N steps.
        noises: Unit noises [B, N, ...], if steps add any.
        window: How many of the noisiest unfinished states are evaluated; None for all.
        tolerance: A state has converged when the root mean square of its change is at most this many standard
            deviations of the noise that DDPM's next step, from that state, adds; the result is not asked.
        max_iterations: After so many the states are returned as they are; None for N.
        initial_trajectory: States [B, N + 1, ...] to begin with, of another solution; state N is taken from `latents`.
        variation_steps: With an initial trajectory, the number of steps to solve: states from this one up stay as they
            are. None for N, with which the solution is exact for these latents and this denoiser.
        callback: Is called after each iteration.

    Returns:
        The solution.

    Raises:
        ValueError: A number is out of range, or a tensor is missing or of the wrong shape.
    """
    check_tolerance(tolerance)
    # the first: state 0 has no step after it
    limits = [math.inf, *(tolerance * coefficients.posterior_deviations[:-1]).tolist()]
    return solve(
        denoise,
        latents,
        coefficients,
        lambda moved: _Picard(along(moved.state_factors, latents), limits),
        noises=noises,
        window=window,
        max_iterations=max_iterations,
        initial_trajectory=initial_trajectory,
        variation_steps=variation_steps,
        callback=callback,
    )


class _Picard:
    exact = True

    def __init__(self, factors: Tensor, limits: list[float]) -> None:
        self._factors = factors
        self.limits = limits
        self._new = factors

    def propose(self, states: Tensor, increments: Tensor, rows: slice) -> Tensor:
        before = states[rows.start + 1 : rows.stop + 1]
        changes = self._factors[rows] * before + increments - before
        self._new = states[rows.stop] + changes.flip(0).cumsum(0).flip(0)
        return (self._new - states[rows]).flatten(1).square().mean(1).sqrt()

    def renew(self, states: Tensor, rows: slice, converged: int) -> None:
        states[rows] = self._new
