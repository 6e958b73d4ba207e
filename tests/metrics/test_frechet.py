import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from asyncdiff_pl.metrics.frechet import FrechetDistance, check_features, load_features
from asyncdiff_pl.metrics.networks import MissingNetwork


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


def test_the_network_names_the_column(tmp_path, monkeypatch):
    name, network = load_features("tiny-clip")
    assert name.startswith("frechet_distance (tiny-clip")
    assert network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, network.num_features)
    (tmp_path / "own_features.py").write_text("from torch import nn\n\nclass Mine(nn.Flatten):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_features("own_features.Mine")[0] == "frechet_distance (own_features.Mine)"
    for file, column in (("mine.pt", "frechet_distance (mine.pt)"), ("inception-2015-12-05.pt", "fid")):
        torch.jit.save(torch.jit.trace(Colours(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), tmp_path / file)
        name, network = load_features(str(tmp_path / file))
        assert name == column
        assert network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.pt", "There is no file nowhere.pt for the Fréchet distance; give"),
        ("./nowhere", "There is no folder ./nowhere"),
        ("no_such_module.Thing", "There is no class no_such_module.Thing"),
        ("asyncdiff_pl.metrics.networks.MissingNetwork", "is no torch.nn.Module"),
    ],
)
def test_a_network_that_is_none(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_features(source)
        load_features(source)


def test_without_torch_fidelity_fid_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(MissingNetwork, match=r"Inception network cannot be had .* install torch-fidelity"):
        load_features("inception")
