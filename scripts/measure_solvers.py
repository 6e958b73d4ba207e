"""Counts the iterations of the solvers that are parallel in time, on a Gaussian mixture whose noise is known exactly.

    python scripts/measure_solvers.py --samples 4

Prints Markdown: for each number of steps and η the iterations of ParaTAA by order and memory, how far its result is
from the sequential one, and ParaDiGMS's. The mixture, and what counts as an iteration: tests/sampling/mixture.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sampling"))

from mixture import problem

from asyncdiff_pl.sampling import Solution, picard, sequential, triangular_anderson

MEMORIES = (1, 2, 3)


def main(samples: int = 4, steps: Sequence[int] = (50, 100), seed: int = 0) -> None:
    """Prints the tables.

    Args:
        samples: How many samples, each with its own noise.
        steps: Numbers of steps.
        seed: Seed of the mixture's means.
    """
    orders = (1, 20, None)
    titles = [f"order {order or 'N'}: memory 1 / 2 / 3" for order in orders]
    titles += ["window 20: memory 2 / 5", "ParaDiGMS, tolerance 0.1 / 0.01"]
    iterations, evaluations, distances = (["| N, η | " + " | ".join(titles) + " |", "|---" * 6 + "|"] for _ in range(3))
    for number in steps:
        for eta in (0.0, 1.0):
            estimate, latents, coefficients, noises = problem(number, eta, samples, seed=seed)
            expected = sequential(estimate, latents, coefficients, noises=noises).latents
            cells = [
                [(triangular_anderson, {"order": order, "memory": memory}) for memory in MEMORIES] for order in orders
            ]
            cells.append([(triangular_anderson, {"order": 20, "window": 20, "memory": memory}) for memory in (2, 5)])
            cells.append([(picard, {"tolerance": tolerance}) for tolerance in (0.1, 0.01)])
            found = [
                [solver(estimate, latents, coefficients, noises=noises, **settings) for solver, settings in cell]
                for cell in cells
            ]
            name = f"{number}, {eta:g}"
            iterations.append(_row(name, [[_range(one.iterations) for one in cell] for cell in found]))
            times = [[f"{sum(one.evaluations) / samples / number:.1f}" for one in cell] for cell in found]
            evaluations.append(_row(name, times))
            distances.append(_row(name, [[f"{_distance(one, expected):.0e}" for one in cell] for cell in found]))
    print(f"Iterations until convergence, least and most of {samples} samples:\n", *iterations, sep="\n")
    print("\nEvaluations of the denoiser, times those of the sequential sampler:\n", *evaluations, sep="\n")
    print("\nRelative distance to the sequential result:\n", *distances, sep="\n")


def _row(name: str, cells: list[list[Any]]) -> str:
    return f"| {name} | " + " | ".join(" / ".join(cell) for cell in cells) + " |"


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def _distance(found: Solution, expected: Tensor) -> float:
    return ((found.latents - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    auto_cli(main, as_positional=False)
