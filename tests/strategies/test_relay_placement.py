"""What of a module a strategy brings to its device when each rank holds its own stage's weights alone."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from asyncdiff_pl.strategies import AsyncDiffStrategy


class Module(LightningModule):
    """A module with a pipeline, whose denoiser is known under two names."""

    def __init__(self):
        super().__init__()
        self.vae, self.unet = nn.Linear(2, 2), nn.Linear(2, 2)
        self.parts = nn.ModuleDict({"unet": self.unet})
        self.pipeline = SimpleNamespace(vae=self.vae, unet=self.unet)


@pytest.mark.parametrize(("mode", "place"), [("replicated", "meta"), ("relay", "cpu")])
def test_the_denoiser_stays_until_its_cut_is_known(mode, place, monkeypatch):
    strategy, module = AsyncDiffStrategy(stages=2, warm_up_mode=mode), Module()
    module.trainer = SimpleNamespace(datamodule=None)
    strategy.connect(module)
    monkeypatch.setattr(AsyncDiffStrategy, "root_device", torch.device("meta"))
    names = list(module.state_dict())
    strategy.model_to_device()
    assert {weight.device.type for weight in module.unet.parameters()} == {place}
    assert {weight.device.type for weight in module.vae.parameters()} == {"meta"}
    assert module.device.type == "meta"
    assert list(module.state_dict()) == names
    assert module.parts["unet"] is module.unet
