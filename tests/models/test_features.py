import pytest
import torch
from torch import nn

from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.models.features import check_features, load_features


class Colours(nn.Module):
    """The mean of each colour, and the largest red."""

    def forward(self, pictures):
        pixels = pictures.float() / 255
        return torch.cat([pixels.mean((2, 3)), pixels[:, :1].amax((2, 3))], 1)


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
