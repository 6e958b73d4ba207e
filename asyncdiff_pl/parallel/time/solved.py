"""What solving the steps of some samples together came to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncdiff_pl.sampling import Solution, StepCoefficients


@dataclass(frozen=True)
class Solved:
    """The samples of one call of a pipeline, B of them, in N steps.

    The first step in time is exact; the others are solved together.

    Args:
        trajectory: [B, N + 1, ...], in the scale in which a denoiser is given states: state 0 is the result, state N
            the noise.
        timesteps: Timesteps of the steps, in the scheduler's order.
        scheduler: Class of the scheduler.
        iterations: For each sample the rounds of evaluations that it took part in.
        denoiser_calls: For each sample the states that the denoiser was given, the first step's included; one step
            after the other takes N.
        unfinished: For each sample the states that had not converged when the iterations ended.
        residuals: For each sample [iterations, N - 1]: by how much, as a root mean square, each state differed from
            what its step makes of the others; number 0 is the result's, NaN where a state was not evaluated.
        scales: What the states are multiplied with to be a pipeline's latents, [N + 1].
    """

    trajectory: Tensor
    timesteps: list[float]
    scheduler: str
    iterations: list[int]
    denoiser_calls: list[int]
    unfinished: list[int]
    residuals: list[Tensor]
    scales: list[float]

    @classmethod
    def of(cls, solution: Solution, noise: Tensor, coefficients: StepCoefficients, scheduler: str) -> Solved:
        """Puts the exact step and the solution of the others together.

        Args:
            solution: Of N - 1 steps.
            noise: State N of each sample, [B, ...].
            coefficients: All N steps.
            scheduler: Class of the scheduler.
        """
        return cls(
            trajectory=torch.cat([solution.trajectory, noise[:, None].to(solution.trajectory.dtype)], 1),
            timesteps=coefficients.timesteps.flip(0).tolist(),
            scheduler=scheduler,
            iterations=solution.iterations,
            denoiser_calls=[1 + number for number in solution.evaluations],
            unfinished=solution.finished,
            residuals=solution.residuals,
            scales=coefficients.latent_scales.tolist(),
        )

    def latents(self, state: int) -> Tensor:
        """A state of all samples as the pipeline has it, [B, ...].

        Args:
            state: From 0, the result, to N, the noise.
        """
        states = self.trajectory[:, state]
        return (states.to(torch.promote_types(states.dtype, torch.float32)) * self.scales[state]).to(states.dtype)
