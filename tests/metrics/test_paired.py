import math

import pytest
import torch

from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [([1.0, 2.0, 3.0], 2.0, 1 / math.sqrt(3)), ([2.0, 2.0], 2.0, 0.0), ([-1.0, 1.0], 0.0, 1.0)],
)
def test_mean_and_standard_error(values, mean, error):
    found = mean_with_error(torch.tensor(values))
    assert tuple(found) == pytest.approx((mean, error))


def test_what_is_common_to_a_pair_does_not_count():
    common = torch.tensor([10.0, -50.0, 300.0, 7.0])
    found = paired_difference(common + torch.tensor([1.0, 2.0, 1.0, 2.0]), common)
    assert found.value == pytest.approx(1.5)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert found.in_standard_errors == pytest.approx(3 * math.sqrt(3))


@pytest.mark.parametrize(("shift", "expected"), [(1.0, math.inf), (-1.0, -math.inf), (0.0, 0.0), (0.1, math.inf)])
def test_samples_that_all_agree(shift, expected):
    zeros = torch.zeros(3, dtype=torch.double)
    assert paired_difference(zeros + shift, zeros).in_standard_errors == expected


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"equal numbers of samples; given are \(3,\), \(2,\)"):
        paired_difference(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"2 or more samples \[n\]; given is \(1,\)"):
        mean_with_error(torch.zeros(1))


@pytest.mark.parametrize(
    ("value", "error", "texts"),
    [
        (-0.6718, 0.5412, ("-0.67", "0.54")),
        (21.0, 0.577, ("21.00", "0.58")),
        (193.2, 20.4, ("193", "20")),
        (4.555, 0.0312, ("4.555", "0.031")),
        (15523.0, 231.0, ("15523", "231")),
        (1.5, 0.0, ("1.5", "0")),
        (0.0, 0.0, ("0", "0")),
        (0.0325511, 6.9e-18, ("0.03255", "0")),
        (32.134, float("nan"), ("32.13", "")),
        (float("inf"), float("nan"), ("inf", "")),
    ],
)
def test_a_mean_has_the_decimals_of_its_error(value, error, texts):
    assert Mean(value, error).texts() == texts
