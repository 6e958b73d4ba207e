"""Iterations over a window of steps that slides from noise to the result, each sample at its own pace.

All states of a sample are unknowns; an iteration evaluates the denoiser on the noisiest unfinished ones of every sample
in one call, lets the method (`triangular_anderson`, `picard`) make new states of the estimates, and slides each
sample's window past what has converged. There is one synchronisation with the device an iteration, for the residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from asyncdiff_pl.sampling.coefficients import StepCoefficients, along
from asyncdiff_pl.sampling.noises import added_noises
from asyncdiff_pl.sampling.solution import Callback, Denoise, Iteration, Solution


class Method(Protocol):
    """How one sample's states are renewed."""

    limits: list[float]
    """For each step the residual up to which its state counts as converged."""
    exact: bool
    """Whether the noisiest state that has not converged is finished by its renewal."""

    def propose(self, states: Tensor, increments: Tensor, rows: slice) -> Tensor:
        """Compares the states with what their steps make of the noisier ones.

        Args:
            states: All states [N + 1, ...].
            increments: What each of the window's steps adds to its scaled state: d ε + n ξ, [W, ...].
            rows: The window's steps; step i leads to state i.

        Returns:
            Residuals [W].
        """

    def renew(self, states: Tensor, rows: slice, converged: int) -> None:
        """Writes the window's new states.

        Args:
            states: All states [N + 1, ...].
            rows: The window's steps, as in the call of `propose` before.
            converged: States from this one up have converged.
        """


@torch.no_grad()
def solve(
    denoise: Denoise,
    latents: Tensor,
    coefficients: StepCoefficients,
    method: Callable[[StepCoefficients], Method],
    *,
    noises: Tensor | None,
    window: int | None,
    max_iterations: int | None,
    initial_trajectory: Tensor | None,
    variation_steps: int | None,
    callback: Callback | None,
) -> Solution:
    """Iterates until all samples have converged; the arguments are those of the methods' own functions."""
    number = len(coefficients)
    window = number if window is None else window
    max_iterations = number if max_iterations is None else max_iterations
    check_at_least_one(window=window, max_iterations=max_iterations)
    starts = _starts(latents, number, coefficients.initial_scale, initial_trajectory, variation_steps)
    finished = number if variation_steps is None else variation_steps
    initialised = finished if initial_trajectory is None else 0
    added = added_noises(coefficients, noises, latents)
    coefficients = coefficients.to(latents.device)
    samples = [
        _Sample(index, states, method(coefficients), None if added is None else added[index], finished, initialised)
        for index, states in enumerate(starts)
    ]
    for iteration in range(1, max_iterations + 1):
        active = [sample for sample in samples if sample.finished > 0]
        if not active:
            break
        for sample in active:
            sample.open_window(window)
        flat_samples = [sample.index for sample in active for _ in sample.steps]
        flat_steps = [step for sample in active for step in sample.steps]
        inputs = [sample.states[sample.rows.start + 1 : sample.rows.stop + 1] for sample in active]
        timesteps = torch.cat([coefficients.timesteps[sample.rows] for sample in active])
        outputs = denoise(torch.cat(inputs).to(latents.dtype), timesteps, flat_samples, flat_steps)
        shares = outputs.split([len(sample.steps) for sample in active])
        found = [
            sample.propose(coefficients, states, share)
            for sample, states, share in zip(active, inputs, shares, strict=True)
        ]
        residuals = torch.cat(found).tolist()  # the iteration's one synchronisation
        remaining = iter(residuals)
        for sample in active:
            sample.renew([next(remaining) for _ in sample.steps])
        if callback is not None:
            positions, trajectories = [sample.finished for sample in samples], [sample.states for sample in samples]
            callback(Iteration(iteration, flat_samples, flat_steps, residuals, positions, trajectories))
    trajectory = torch.stack([sample.states for sample in samples])
    return Solution(
        latents=(trajectory[:, 0] * coefficients.final_scale).to(latents.dtype),
        trajectory=trajectory.to(latents.dtype),
        iterations=[len(sample.history) for sample in samples],
        evaluations=[sample.evaluations for sample in samples],
        finished=[sample.finished for sample in samples],
        residuals=[torch.tensor(sample.history).view(-1, number) for sample in samples],
    )


def check_at_least_one(**numbers: int) -> None:
    """Tells which of the numbers is below 1.

    Raises:
        ValueError: In one sentence.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more.")


def check_tolerance(tolerance: float) -> None:
    """Tells that a tolerance is negative.

    Raises:
        ValueError: In one sentence.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 (solve exactly) or more.")


class _Sample:
    """One sample: its states, and where its window is."""

    def __init__(
        self, index: int, states: Tensor, method: Method, added: Tensor | None, finished: int, initialised: int
    ) -> None:
        self.index = index
        self.states = states
        self.method = method
        self.added = added
        self.finished = finished
        self.initialised = initialised
        self.rows = slice(finished, finished)
        self.evaluations = 0
        self.history: list[list[float]] = []

    @property
    def steps(self) -> range:
        return range(self.rows.start, self.rows.stop)

    def open_window(self, size: int) -> None:
        lowest = max(self.finished - size, 0)
        self.rows = slice(lowest, self.finished)
        if lowest < self.initialised:
            self.states[lowest : self.initialised] = self.states[self.initialised]
            self.initialised = lowest

    def propose(self, coefficients: StepCoefficients, inputs: Tensor, outputs: Tensor) -> Tensor:
        estimates = coefficients.noise_estimates(outputs, inputs, self.rows)
        increments = along(coefficients.estimate_factors[self.rows], inputs) * estimates
        if self.added is not None:
            increments += self.added[self.rows]
        return self.method.propose(self.states, increments, self.rows)

    def renew(self, residuals: list[float]) -> None:
        self.evaluations += len(residuals)
        self.history.append([float("nan")] * (len(self.states) - 1))
        self.history[-1][self.rows] = residuals
        lowest, limits = self.rows.start, self.method.limits
        waiting = [step for step in self.steps if not residuals[step - lowest] <= limits[step]]
        converged = waiting[-1] + 1 if waiting else lowest
        self.method.renew(self.states, self.rows, converged)
        self.finished = converged - 1 if waiting and self.method.exact else converged


def _starts(
    latents: Tensor, number: int, scale: float, trajectory: Tensor | None, variation_steps: int | None
) -> list[Tensor]:
    """Each sample's states [N + 1, ...] at the start."""
    noise = latents.double() * scale
    if trajectory is None:
        if variation_steps is not None:
            raise ValueError(f"variation_steps is {variation_steps}, but there is no initial_trajectory; give both.")
        return [one.repeat(number + 1, *[1] * one.ndim) for one in noise]
    expected = (len(latents), number + 1, *latents.shape[1:])
    if trajectory.shape != expected:
        raise ValueError(
            f"initial_trajectory is {tuple(trajectory.shape)}, but {number} steps of these latents need {expected}; "
            "give one of a run with as many steps and of the same size."
        )
    if variation_steps is not None and not 1 <= variation_steps <= number:
        raise ValueError(f"variation_steps is {variation_steps}; give one from 1 to the number of steps, {number}.")
    states = trajectory.to(latents.device, torch.float64, copy=True)
    states[:, -1] = noise
    return [*states]
