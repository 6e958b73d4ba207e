"""Against torchmetrics' own LPIPS, for which torchvision's AlexNet stands in with random weights."""

import pytest
import torch
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from asyncdiff_pl.metrics import networks
from asyncdiff_pl.metrics.lpips import LPIPS, alexnet_features, load_lpips
from asyncdiff_pl.metrics.networks import MissingNetwork


@pytest.fixture
def alexnet():
    torch.manual_seed(0)
    weights = {f"features.{name}": tensor for name, tensor in alexnet_features().state_dict().items()}
    return weights | {"classifier.6.bias": torch.zeros(1000)}


def test_it_is_that_of_torchmetrics(alexnet, monkeypatch, tmp_path):
    torch.save(alexnet, tmp_path / "alexnet.pth")
    network = load_lpips(str(tmp_path / "alexnet.pth"))
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: network.features)
    theirs = torchmetrics_lpips._NoTrainLpips(net="alex")
    first, second = torch.rand(2, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    second[1] = first[1]
    found = network(first, second)
    assert found.tolist() == pytest.approx(theirs(first, second, normalize=True).flatten().tolist(), rel=1e-4)
    assert found[0] > 1e-4
    assert found[1] == 0


def test_small_pictures_and_other_weights_are_refused(alexnet, tmp_path):
    network = LPIPS(alexnet)
    assert network(torch.rand(1, 3, 31, 31), torch.rand(1, 3, 31, 31)).shape == (1,)
    with pytest.raises(ValueError, match="31 x 31 pixels or more; given are 31 x 30"):
        network(torch.rand(1, 3, 30, 31), torch.rand(1, 3, 30, 31))
    with pytest.raises(ValueError, match="are not those of AlexNet"):
        LPIPS({"features.0.weight": torch.zeros(1)})
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"x.pth holds no weights that torch can read"):
        load_lpips(str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match=r"There is no file nowhere for LPIPS; give the path of alexnet-owt"):
        load_lpips("nowhere")


def test_weights_that_cannot_be_fetched_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("asyncdiff_pl.metrics.lpips.ALEXNET", (tmp_path / "alexnet-owt-7be5be79.pth").as_uri())
    with pytest.raises(
        MissingNetwork, match=r"for LPIPS could not be fetched .* local copy of alexnet-owt-7be5be79.pth"
    ):
        load_lpips(networks.FETCH)
