"""ParaTAA: all steps of a sample as a triangular system, solved by a fixed-point iteration with Anderson acceleration.

After Tang et al. (2024), "Accelerating Parallel Sampling of Diffusion Models": k-th order equations (section 3),
triangular Anderson acceleration and its safeguard (section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncdiff_pl.sampling.coefficients import StepCoefficients, along
from asyncdiff_pl.sampling.solution import Callback, Denoise, Solution
from asyncdiff_pl.sampling.windows import check_at_least_one, check_tolerance, solve

_LONGEST_LAST_MOVE = 10  # tolerances


def triangular_anderson(
    denoise: Denoise,
    latents: Tensor,
    coefficients: StepCoefficients,
    *,
    noises: Tensor | None = None,
    order: int | None = None,
    window: int | None = None,
    memory: int = 2,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    safeguard: bool = True,
    regularization: float = 1e-3,
    initial_trajectory: Tensor | None = None,
    variation_steps: int | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Solves all steps together.

    An iteration is one evaluation of the denoiser on every sample's window. With the safeguard each iteration finishes
    at least one state, so that N always suffice, and a tolerance of 0 gives the sequential result.

    Args:
        denoise: Evaluates the denoiser.
        latents: The noise that a pipeline begins with, [B, ...].
        coefficients: The scheduler's N steps.
        noises: Unit noises [B, N, ...], if steps add any.
        order: Over how many steps an equation reaches, k; None for all of the window.
        window: How many of the noisiest unfinished states are evaluated; None for all.
        memory: Of how many iterates the acceleration makes a new one, m; 1 is the plain fixed-point iteration.
        tolerance: A state has converged when the root mean square of its first-order residual is at most this. It is to
            be well below what one step changes (some 1 / N), or the noise itself counts as converged.
        max_iterations: After so many the states are returned as they are; None for N.
        safeguard: Whether the noisiest state that has not converged, and what is noisier, are left unaccelerated.
        regularization: λ of the acceleration's least squares; inner products are sums over states and elements.
        initial_trajectory: States [B, N + 1, ...] to begin with, of another solution; state N is taken from `latents`.
        variation_steps: With an initial trajectory, the number of steps to solve: states from this one up stay as they
            are. None for N, with which the solution is exact for these latents and this denoiser.
        callback: Is called after each iteration.

    Returns:
        The solution.

    Raises:
        ValueError: A number is out of range, or a tensor is missing or of the wrong shape.
    """
    order = len(coefficients) if order is None else order
    check_at_least_one(order=order, memory=memory)
    check_tolerance(tolerance)
    return solve(
        denoise,
        latents,
        coefficients,
        lambda moved: _TriangularAnderson(moved, latents, order, memory, tolerance, safeguard, regularization),
        noises=noises,
        window=window,
        max_iterations=max_iterations,
        initial_trajectory=initial_trajectory,
        variation_steps=variation_steps,
        callback=callback,
    )


class _TriangularAnderson:
    def __init__(
        self,
        coefficients: StepCoefficients,
        latents: Tensor,
        order: int,
        memory: int,
        tolerance: float,
        safeguard: bool,
        regularization: float,
    ) -> None:
        number, shape = len(coefficients), latents.shape[1:]
        self.limits = [tolerance] * number
        self.exact = safeguard
        self._order = order
        self._regularization = regularization
        factors = coefficients.state_factors
        self._factors = along(factors, latents)
        self._products = along(torch.cat([factors.new_ones(1), factors.cumprod(0)]), latents)
        self._residual = factors.new_zeros(0)
        self._last_lowest = number
        if memory > 1:
            self._last_states = factors.new_zeros(number, *shape)
            self._last_residuals = factors.new_zeros(number, *shape)
            # differences of iterates: of residuals, and of states and residuals together; which of them there are
            self._residual_changes = factors.new_zeros(number, memory - 1, shape.numel())
            self._changes = factors.new_zeros(number, memory - 1, shape.numel())
            self._valid = factors.new_zeros(number, memory - 1, 1)
        self._memory = memory
        self._slot = 0

    def propose(self, states: Tensor, increments: Tensor, rows: slice) -> Tensor:
        current = states[rows]
        first = self._factors[rows] * states[rows.start + 1 : rows.stop + 1] + increments
        # Π a over the steps between makes the equations of all orders differences of one running sum
        products = self._products[rows.start : rows.stop + 1]
        sums = (products[:-1] * increments).cumsum(0)
        sums = torch.cat([torch.zeros_like(sums[:1]), sums])
        reached = products * states[rows.start : rows.stop + 1] + sums
        far = min(self._order, len(current))
        ends = torch.cat([reached[far:], reached[-1:].expand(far - 1, *reached.shape[1:])])
        self._residual = (ends - sums[:-1]) / products[:-1] - current
        return _root_mean_square(first - current)

    def renew(self, states: Tensor, rows: slice, converged: int) -> None:
        current = states[rows]
        new = current + self._residual
        position = converged - rows.start
        if self._memory > 1:
            self._remember(current, rows)
            accelerated = position - 1 if self.exact else position
            if accelerated > 0:
                new[:accelerated] -= self._correction(rows)[:accelerated]
        # a far-reaching equation adds up the residuals of many steps, each times the Π a between: where that would
        # throw a state that has converged out of its place (a start from another's trajectory), it stays there
        far = _root_mean_square(self._residual[position:]) > _LONGEST_LAST_MOVE * self.limits[0]
        new[position:] = torch.where(along(far, new), current[position:], new[position:])
        states[rows] = new

    def _remember(self, current: Tensor, rows: slice) -> None:
        # a step that has just entered the window has no iterate before this one, and its difference stays invalid
        known = slice(min(self._last_lowest, rows.stop), rows.stop)
        offset = known.start - rows.start
        self._valid[known, self._slot] = 1
        residual_change = (self._residual[offset:] - self._last_residuals[known]).flatten(1)
        self._residual_changes[known, self._slot] = residual_change
        self._changes[known, self._slot] = residual_change + (current[offset:] - self._last_states[known]).flatten(1)
        self._slot = (self._slot + 1) % (self._memory - 1)
        self._last_states[rows] = current
        self._last_residuals[rows] = self._residual
        self._last_lowest = rows.start

    def _correction(self, rows: slice) -> Tensor:
        changes, valid = self._residual_changes[rows], self._valid[rows]
        gram = valid * _sums_from_noise(changes @ changes.mT) * valid.mT
        target = valid * _sums_from_noise(changes @ self._residual.flatten(1)[..., None])
        ridge = self._regularization * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # solve_ex, unlike solve, does not wait for the device to report errors; the ridge rules them out
        weights = torch.linalg.solve_ex(gram + ridge, target).result
        return (weights.mT @ self._changes[rows]).view_as(self._residual)


def _root_mean_square(differences: Tensor) -> Tensor:
    return differences.flatten(1).square().mean(1).sqrt()


def _sums_from_noise(products: Tensor) -> Tensor:
    """For each step of [W, ...] the sum over itself and all noisier ones."""
    return products.flip(0).cumsum(0).flip(0)
