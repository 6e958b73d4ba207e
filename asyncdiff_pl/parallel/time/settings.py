"""How a sample's steps are solved together: the settings, and how an iteration's evaluations are shared out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from asyncdiff_pl.sampling.windows import check_at_least_one, check_tolerance

SolverName = Literal["triangular_anderson", "picard"]

TOLERANCES: dict[SolverName, float] = {"triangular_anderson": 1e-3, "picard": 0.1}
"""Up to which residual a state counts as converged; what is measured differs between the methods."""


@dataclass(frozen=True)
class TimeParallel:
    """How the steps of a sample are solved together, on how many ranks; it validates itself.

    Args:
        method: "triangular_anderson" (ParaTAA) or "picard" (ParaDiGMS).
        ranks: Ranks of the pipeline, which share out each iteration's evaluations of the denoiser.
        order: Over how many steps an equation of triangular_anderson reaches; None for all of the window.
        window: How many of the noisiest unfinished states an iteration evaluates; None for all.
        memory: Of how many iterates triangular_anderson makes a new one, 1 or more.
        tolerance: Residual up to which a state counts as converged; None for the method's own, 1e-3 and 0.1; 0 gives
            what one step after the other gives.
        eta: Noise that DDIM's steps add, from 0 (none) to 1 (DDPM's); None for the pipeline's own.
        max_iterations: After so many the states are taken as they are; None for as many as it takes.
        safeguard: Whether triangular_anderson leaves the noisiest unfinished state, and what is noisier, unaccelerated,
            so that each iteration finishes a state.
        batch: The most inputs, halves of a guidance batch counted, that one call of the denoiser gets; None for no
            limit.
        initial_trajectory: States [B, N + 1, ...] of another solution of N steps to begin with, or what gives them, or
            None, for the number of steps when a sample begins; None begins with the noise.
        variation_steps: With an initial trajectory, how many of the last steps are solved; states before them stay as
            they are. None for all, with which the result is exact.

    Raises:
        ValueError: A setting is out of range.
    """

    method: SolverName = "triangular_anderson"
    ranks: int = 1
    order: int | None = None
    window: int | None = None
    memory: int = 2
    tolerance: float | None = None
    eta: float | None = None
    max_iterations: int | None = None
    safeguard: bool = True
    batch: int | None = None
    initial_trajectory: Tensor | Callable[[int], Tensor | None] | None = None
    variation_steps: int | None = None

    def __post_init__(self) -> None:
        if self.method not in TOLERANCES:
            raise ValueError(f"method is {self.method}; take {' or '.join(TOLERANCES)}.")
        names = ("ranks", "order", "window", "memory", "max_iterations", "batch", "variation_steps")
        given = {name: getattr(self, name) for name in names}
        check_at_least_one(**{name: number for name, number in given.items() if number is not None})
        check_tolerance(self.limit)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; give one from 0 (no noise) to 1 (the noise of DDPM).")
        if self.variation_steps is not None and self.initial_trajectory is None:
            raise ValueError(
                f"variation_steps is {self.variation_steps}, but there is no initial_trajectory; give both."
            )
        if self.method == "picard":
            for name, default in (("order", None), ("memory", 2), ("safeguard", True)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is for triangular_anderson, and method is picard; leave {name} at its default."
                    )

    def check_variation_steps(self, steps: int) -> None:
        """Tells whether no more steps are to be solved than there are.

        Args:
            steps: Steps of a sample.

        Raises:
            ValueError: There are fewer.
        """
        if self.variation_steps is not None and self.variation_steps > steps:
            raise ValueError(
                f"variation_steps is {self.variation_steps}; give one from 1 to the number of steps, {steps}."
            )

    @property
    def limit(self) -> float:
        """The tolerance in use."""
        return TOLERANCES[self.method] if self.tolerance is None else self.tolerance


def share_sizes(number: int, ranks: int) -> list[int]:
    """Sizes of the shares of some evaluations, one a rank: they differ by at most one.

    Args:
        number: Evaluations.
        ranks: Ranks.
    """
    each, more = divmod(number, ranks)
    return [each + (rank < more) for rank in range(ranks)]
