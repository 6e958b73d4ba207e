"""Moments of groups by the kernels of torch's SyncBatchNorm: on a GPU those themselves, else what they compute."""

import pytest
import torch
from torch import nn

from asyncdiff_pl.parallel.patches import moments as under_test
from asyncdiff_pl.parallel.patches.moments import apply, combine, corrected, moments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stats(groups, eps):
    variance, mean = torch.var_mean(groups.float(), (0, 2), correction=0)
    return mean, torch.rsqrt(variance + eps)


def gather(like, means, inverses, running_mean, running_variance, momentum, eps, counts):
    """One part after the other, as the kernel does."""
    assert like.dtype == counts.dtype == torch.float32
    count, mean, spread = 0.0, 0.0, 0.0
    for part, inverse, more in zip(means, inverses, counts, strict=True):
        spread = spread + (inverse**-2 - eps) * more + (mean - part) ** 2 * count * more / (count + more)
        mean, count = (mean * count + part * more) / (count + more), count + more
    return mean, torch.rsqrt(spread / count + eps)


def elemt(values, weight, bias, mean, inverse, eps):
    channels = [1, -1, 1]
    found = (values.float() - mean.view(channels)) * inverse.view(channels)
    if weight is not None:
        found = found * weight.float().view(channels) + bias.float().view(channels)
    return found.to(values.dtype)


@pytest.fixture
def written_out(monkeypatch):
    """The same functions without the kernels."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(under_test, "has_kernels", lambda tensor: False)
            return function(*args)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(under_test, "has_kernels", lambda tensor: tensor.dtype != torch.float64)
        monkeypatch.setattr(torch, "batch_norm_stats", stats)
        monkeypatch.setattr(torch, "batch_norm_gather_stats_with_counts", gather)
        monkeypatch.setattr(torch, "batch_norm_elemt", elemt)
    return call


def norm_of(groups, channels, affine=True, dtype=torch.float32):
    norm = nn.GroupNorm(groups, channels, eps=1e-4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 4, 4), (3, 8, 5, 3), (2, 8, 3, 4, 4), (1, 8, 96, 128), (1, 8, 63, 130), (2, 8, 512, 512)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_groups_of_any_length(written_out, dtype, shape):
    """Long ones are read in pieces, where they can be halved."""
    torch.manual_seed(0)
    norm = norm_of(4, 8, dtype=dtype)
    hidden = (3 + torch.randn(shape)).to(DEVICE, dtype)
    found, expected = moments(norm, hidden), written_out(moments, norm, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    normalised = apply(norm, hidden, found)
    assert normalised.dtype == dtype
    torch.testing.assert_close(
        normalised.float(), written_out(apply, norm, hidden, expected).float(), rtol=1e-2, atol=1e-4
    )
    # not torch's own in half precision: on a GPU it rounds the moments to it
    exact = norm.float()(hidden.float())
    rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(normalised.float(), exact, rtol=rounding, atol=1e-4)


def test_another_layout_in_memory(written_out):
    norm, hidden = norm_of(4, 8), torch.randn(2, 8, 6, 6, device=DEVICE)
    nhwc = hidden.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(moments(norm, nhwc), moments(norm, hidden))
    torch.testing.assert_close(apply(norm, nhwc, moments(norm, nhwc)), norm(hidden), rtol=1e-4, atol=1e-5)


def test_a_norm_without_weights(written_out):
    norm, hidden = norm_of(4, 8, affine=False), torch.randn(2, 8, 6, 6, device=DEVICE)
    torch.testing.assert_close(apply(norm, hidden, moments(norm, hidden)), norm(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(4, 4), (8, 4, 4), (3, 2, 1, 6)])
def test_uneven_patches_together_are_the_whole(written_out, rows):
    norm, hidden = norm_of(4, 8), 100 + torch.randn(3, 8, sum(rows), 5, device=DEVICE)
    parts = torch.stack([moments(norm, part) for part in hidden.split(rows, 2)])
    torch.testing.assert_close(combine(parts, rows, norm.eps), moments(norm, hidden), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        combine(parts, rows, norm.eps), written_out(combine, parts, rows, norm.eps), rtol=1e-4, atol=1e-4
    )


def test_moments_of_a_step_before_are_corrected_by_the_own_change(written_out):
    """Nothing changed: those of the step before, all patches'; the own rows alone changed: what they add up to."""
    norm, rows = norm_of(4, 8), (4, 2)
    before = torch.randn(2, 8, 6, 5, device=DEVICE)
    of_all = torch.stack([moments(norm, part) for part in before.split(rows, 2)])
    torch.testing.assert_close(
        corrected(of_all[0], of_all, 0, rows, norm.eps), moments(norm, before), rtol=1e-4, atol=1e-4
    )
    own = moments(norm, 0.5 + 2 * torch.randn(2, 8, 4, 5, device=DEVICE))
    (mean, inverse), (own_mean, own_inverse), (was_mean, was_inverse) = moments(norm, before), own, of_all[0]
    expected_mean = mean + own_mean - was_mean
    second = [
        each_inverse**-2 + each**2
        for each, each_inverse in ((mean, inverse), (own_mean, own_inverse), (was_mean, was_inverse))
    ]
    expected = torch.rsqrt(second[0] + second[1] - second[2] - expected_mean**2)
    found = corrected(own, of_all, 0, rows, norm.eps)
    torch.testing.assert_close(found, torch.stack([expected_mean, expected]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, written_out(corrected, own, of_all, 0, rows, norm.eps), rtol=1e-5, atol=1e-5)
