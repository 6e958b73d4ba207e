"""What solvers ask of a denoiser, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Denoise(Protocol):
    """Evaluates the denoiser on a flat list of states: any samples, any steps."""

    def __call__(self, states: Tensor, timesteps: Tensor, samples: list[int], steps: list[int]) -> Tensor:
        """Evaluates the denoiser, guidance included.

        Args:
            states: [M, ...], of the latents' data type and variance preserving scale: what a pipeline's
                `scheduler.scale_model_input` returns.
            timesteps: [M], on the same device, as the scheduler has them.
            samples: For each state the sample's index in the batch.
            steps: For each state the index of its step; the first step in time is N − 1, the last is 0.

        Returns:
            What the scheduler's prediction type names, [M, ...], of the states' shape.
        """


@dataclass(frozen=True)
class Iteration:
    """What one iteration did; the flat lists are those of its call of the denoiser.

    Args:
        number: 1 for the first.
        samples: Whose states were evaluated, [M].
        steps: At which steps, [M].
        residuals: By how much, as a root mean square, each state differed from what its step makes of the others, [M].
        finished: For each sample of the batch the state that is now finished, with all noisier ones: N at the start,
            0 at the end.
        trajectories: For each sample its states [N + 1, ...], float64; the solver's own, so copy what is kept.
    """

    number: int
    samples: list[int]
    steps: list[int]
    residuals: list[float]
    finished: list[int]
    trajectories: list[Tensor]


Callback = Callable[[Iteration], None]


@dataclass(frozen=True)
class Solution:
    """What a solver found for a batch of B samples.

    Args:
        latents: [B, ...], of the scale and data type of the latents that were given.
        trajectory: [B, N + 1, ...]: state 0 is the result in the variance preserving scale, state N the noise.
        iterations: For each sample the rounds of evaluations that it took part in.
        evaluations: For each sample the states that the denoiser was given.
        finished: For each sample the last state that is finished: 0, unless the iterations did not suffice.
        residuals: For each sample [iterations, N]: by how much, as a root mean square, each state differed from what
            its step makes of the others; NaN where a step was not evaluated.
    """

    latents: Tensor
    trajectory: Tensor
    iterations: list[int]
    evaluations: list[int]
    finished: list[int]
    residuals: list[Tensor]

    @property
    def converged(self) -> bool:
        """Whether all samples are finished."""
        return not any(self.finished)
