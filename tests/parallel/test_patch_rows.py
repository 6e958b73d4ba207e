"""Rows of patches as tables, and layers alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.patches.convolution import Halo
from asyncdiff_pl.parallel.patches.group_norm import normalise
from asyncdiff_pl.parallel.patches.moments import combine, moments
from asyncdiff_pl.parallel.patches.rows import Rows, shares, visible_rows
from asyncdiff_pl.parallel.patches.settings import PatchSettings
from asyncdiff_pl.parallel.patches.sites import Now, Site
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.patches.swap import LocalSwap
from asyncdiff_pl.parallel.patches.traffic import Traffic


@pytest.mark.parametrize(
    ("rows", "patches", "unit", "expected"),
    [
        (72, 2, 8, (40, 32)),
        (72, 4, 8, (24, 16, 16, 16)),
        (72, 9, 8, (8,) * 9),
        (128, 4, 4, (32, 32, 32, 32)),
        (64, 3, 8, (24, 24, 16)),
        (24, 2, 8, (16, 8)),
        (5, 3, 1, (2, 2, 1)),
    ],
)
def test_shares(rows, patches, unit, expected):
    """SVD at 576 rows is the first."""
    assert shares(rows, patches, unit) == expected


@pytest.mark.parametrize(
    ("rows", "patches", "message"),
    [(68, 2, "68 rows, and a UNet that halves them 3 times .* multiple of 8"), (72, 10, "10 .* at most 9 fit")],
)
def test_rows_that_cannot_be_shared(rows, patches, message):
    with pytest.raises(ValueError, match=message):
        shares(rows, patches, 8)


@pytest.mark.parametrize(
    ("portion", "patch", "sizes", "expected"),
    [
        (1, 1, (4, 2, 2), {0: slice(0, 4), 2: slice(0, 2)}),
        (1, 0, (4, 2, 2), {1: slice(0, 2), 2: slice(0, 2)}),
        (0.5, 1, (4, 2, 2), {0: slice(2, 4), 2: slice(0, 1)}),
        (0.5, 0, (4, 2, 2), {1: slice(0, 1)}),
        (0.3, 1, (20, 10, 10), {0: slice(14, 20), 2: slice(0, 3)}),
        (0.1, 1, (4, 2, 2), {}),
        (0.999, 2, (4, 2, 2), {1: slice(0, 2)}),
        (0, 1, (4, 2, 2), {}),
    ],
)
def test_visible_rows(portion, patch, sizes, expected):
    """Whole rows, those of a neighbour that are nearest; below 1 of no other patch."""
    assert visible_rows(portion, patch, sizes) == expected


def test_shares_at_the_levels_of_a_network():
    rows = Rows((40, 32), (1,))
    assert [rows.at(own) for own in (32, 16, 8, 4)] == [(40, 32), (20, 16), (10, 8), (5, 4)]
    with pytest.raises(ValueError, match="was given 3 rows where the latents have 32"):
        rows.at(3)


def test_arguments_are_cut_at_any_level():
    whole = torch.arange(18.0).view(1, 1, 18, 1)
    cut = Rows((40, 32), (1,)).take(whole)
    assert cut.flatten().tolist() == list(range(10, 18))
    with pytest.raises(ValueError, match="has 7 rows where the latents have 72"):
        Rows((40, 32), (1,)).take(torch.zeros(1, 1, 7, 1))


@pytest.mark.parametrize(
    ("settings", "above", "below"),
    [
        ({"kernel_size": 3, "padding": 1}, 1, 1),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, 1, 0),
        ({"kernel_size": 2, "stride": 2}, 0, 0),
        ({"kernel_size": 5, "padding": 2}, 2, 2),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, 2, 2),
    ],
)
def test_halos(settings, above, below):
    convolution = nn.Conv2d(1, 1, **settings)
    assert Halo.of(convolution, "conv") == Halo(above, below)
    rows = torch.randn(1, 1, 16, 8)
    extended = F.pad(rows[:, :, 8:], (convolution.padding[1],) * 2)
    extended = torch.cat([F.pad(rows[:, :, 8 - above : 8], (convolution.padding[1],) * 2), extended], 2)
    extended = F.pad(extended, (0, 0, 0, below))
    found = F.conv2d(extended, convolution.weight, convolution.bias, convolution.stride, 0, convolution.dilation)
    assert torch.allclose(found, convolution(rows)[:, :, -found.shape[2] :], atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"padding": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_that_change_rows(settings):
    with pytest.raises(ValueError, match=r"conv is a convolution with kernel .* patches cannot compute row by row"):
        Halo.of(nn.Conv2d(1, 1, 3, **settings), "conv")


def test_moments_of_uneven_patches_are_those_of_the_whole():
    """Far from zero, where a difference of squares loses what is left."""
    norm, hidden = nn.GroupNorm(2, 4), 1000 + torch.randn(3, 4, 7, 5)
    parts = [moments(norm, part) for part in hidden.split([4, 2, 1], 2)]
    assert torch.allclose(combine(torch.stack(parts), [4, 2, 1], norm.eps), moments(norm, hidden), rtol=1e-4)


def test_a_negative_variance_is_replaced_by_the_own_one():
    """The first patch spreads far less than a step before, and less than both patches did together."""
    norm, traffic, rows = nn.GroupNorm(1, 2), Traffic(LocalSwap(), True), Rows((4, 4), (0, 1))
    before = torch.cat([10 * torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)], 2)
    now = torch.cat([0.1 * torch.randn(1, 2, 4, 8), before[:, :, 4:]], 2)
    settings = PatchSettings(Layout(patches=2), "corrected_async_gn", warm_up=1)
    for number, hidden in enumerate((before, now)):
        step = PatchStep.of(settings, number, number == 1, rows, traffic)
        found = normalise(Site("norm", Now(step)), norm, hidden)
        traffic.turn_over()
    assert abs(float(found[:, :, :4].var(correction=0)) - 1) < 1e-2
