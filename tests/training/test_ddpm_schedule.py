"""The noise schedules of DDPM against numbers worked out by hand, and against diffusers' own."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler

from asyncdiff_pl.training.learning_rate import warm_up_constant
from asyncdiff_pl.training.noise_schedule import betas, signal_levels

CASES = {
    # from 0.1 to 0.5 in five steps
    "linear": [0.1, 0.2, 0.3, 0.4, 0.5],
    # even between √0.1 = 0.31623 and √0.5 = 0.70711
    "quadratic": [0.1, 0.171353, 0.261803, 0.371353, 0.5],
    # the first 0.6 × 5 = 3 rise
    "warmup": [0.1, 0.3, 0.5, 0.5, 0.5],
}


@pytest.mark.parametrize(("schedule", "expected"), CASES.items())
def test_schedules_worked_out_by_hand(schedule, expected):
    found = betas(schedule, 5, 0.1, 0.5, warm_up_share=0.6)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_cosine_worked_out_by_hand():
    levels = [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]
    expected = [1 - after / before for before, after in itertools.pairwise(levels)]
    expected[-1] = 0.999  # its end would be 1
    assert betas("cosine", 4).tolist() == pytest.approx(expected, abs=1e-9)


def test_levels_are_products():
    assert signal_levels(torch.tensor([0.1, 0.2, 0.5])).tolist() == pytest.approx([0.9, 0.72, 0.36])


@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "linear"), ("quadratic", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_the_exported_names_mean_the_same_schedules(schedule, name):
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=name).betas
    torch.testing.assert_close(betas(schedule).float(), theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("square",), "noise schedule is square; take one of linear, quadratic, cosine, warmup"),
        (("linear", 1), "has 1 timesteps; give 2 or more"),
        (("linear", 10, 0.5, 0.1), "goes from 0.5 to 0.1; give 0 < start <= end < 1"),
        (("warmup", 10, 0.1, 0.5, 0.0), "warm-up is 0.0; give one above 0"),
    ],
)
def test_schedules_that_cannot_be(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        betas(*arguments)


def test_a_learning_rate_that_stays():
    assert [warm_up_constant(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up_constant(0, 0) == 1
