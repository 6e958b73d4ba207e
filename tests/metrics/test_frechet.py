import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from asyncdiff_pl.metrics.frechet import FrechetDistance


class Colours(nn.Module):
    """The mean of each colour, and of the upper half's red."""

    def forward(self, pictures):
        pixels = pictures.double() / 255
        return torch.cat([pixels.mean((2, 3)), pixels[:, :1, : pixels.shape[2] // 2].mean((2, 3))], 1)


def pictures(number, seed, shift=0):
    pixels = np.random.default_rng(seed).integers(0, 200, (number, 8, 8, 3)) + shift
    return [Image.fromarray(picture.astype(np.uint8)) for picture in pixels]


def by_definition(first, second):
    """Eigenvalues of S^1/2 T S^1/2 in place of those of S T."""
    features = [Colours()(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in (first, second)]
    (m, s), (n, t) = ((x.mean(0), x.T.cov()) for x in features)
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    between = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return ((m - n).square().sum() + s.trace() + t.trace() - 2 * between).item()


def test_it_is_the_distance_of_two_gaussians_in_parts_as_in_one():
    real, generated = pictures(20, 0), pictures(15, 1, shift=20)
    distance, other = FrechetDistance(Colours()), FrechetDistance(Colours())
    distance.add(real[:12], is_real=True)
    distance.add(generated[:1], is_real=False)
    other.add(real[12:], is_real=True)
    other.add(generated[1:], is_real=False)
    distance.merge(other.sums())
    assert distance.counts == (20, 15)
    assert distance.num_features == 4
    assert distance.compute() == pytest.approx(by_definition(real, generated), rel=1e-3)


def test_a_set_has_no_distance_from_itself_and_one_picture_none_at_all():
    distance = FrechetDistance(Colours())
    distance.add([*pictures(6, 0), Image.new("RGB", (16, 8))], is_real=True)
    distance.add([*pictures(6, 0), Image.new("RGB", (16, 8))], is_real=False)
    assert distance.compute() == pytest.approx(0, abs=1e-6)
    distance = FrechetDistance(Colours())
    distance.add(pictures(1, 0), is_real=True)
    with pytest.raises(ValueError, match="2 pictures or more of each kind; given are 1 real ones and 0 generated"):
        distance.compute()
