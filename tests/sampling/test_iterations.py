"""How many iterations the solvers need on the mixture that `mixture.py` publishes."""

import pytest
from mixture import problem

from asyncdiff_pl.sampling import triangular_anderson

RANGES = {1: (13, 16), 2: (9, 11), 3: (8, 10)}


@pytest.mark.parametrize("memory", RANGES)
@pytest.mark.parametrize("order", [20, 50])
def test_50_steps(order, memory):
    estimate, latents, coefficients, _ = problem(50, 0.0, batch=4)
    iterations = triangular_anderson(estimate, latents, coefficients, order=order, memory=memory).iterations
    lowest, highest = RANGES[memory]
    assert lowest <= min(iterations)
    assert max(iterations) <= highest


def test_order_one_is_slow():
    estimate, latents, coefficients, _ = problem(50, 0.0, batch=1)
    assert 35 <= triangular_anderson(estimate, latents, coefficients, order=1, memory=1).iterations[0] <= 45


def test_a_long_memory_is_no_harm_to_steps_that_enter_the_window():
    estimate, latents, coefficients, _ = problem(100, 0.0, batch=4)
    short, long = (
        triangular_anderson(estimate, latents, coefficients, order=20, window=20, memory=memory).iterations
        for memory in (2, 5)
    )
    assert all(one <= other for one, other in zip(long, short, strict=True))
    assert max(long) <= 14
