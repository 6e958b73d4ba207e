"""What a strategy does with encoders of which each rank holds some."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from asyncdiff_pl.parallel import Groups
from asyncdiff_pl.strategies import AsyncDiffStrategy, PatchStrategy


class Module(LightningModule):
    """A module with a pipeline that has an encoder."""

    def __init__(self):
        super().__init__()
        self.text_encoder, self.unet = nn.Linear(2, 2), nn.Linear(2, 2)
        self.pipeline = SimpleNamespace(text_encoder=self.text_encoder, unet=self.unet)
        self.trajectory = None
        self.trainer = SimpleNamespace(datamodule=None)


@pytest.mark.parametrize(
    ("strategy", "encoder", "denoiser"),
    [
        (AsyncDiffStrategy(stages=2), "meta", "meta"),
        (AsyncDiffStrategy(stages=2, share_encoding=True), "cpu", "meta"),
        (AsyncDiffStrategy(stages=2, share_encoding=True, warm_up_mode="relay"), "cpu", "cpu"),
        (PatchStrategy(share_encoding=True), "cpu", "meta"),
        # one rank holds them all, and no other brings them there
        (AsyncDiffStrategy(share_encoding=True), "meta", "meta"),
        (PatchStrategy(share_encoding=True, simulate=True), "meta", "meta"),
    ],
)
def test_encoders_stay_until_it_is_known_who_holds_them(strategy, encoder, denoiser, monkeypatch):
    module = Module()
    strategy.connect(module)
    monkeypatch.setattr(type(strategy), "root_device", torch.device("meta"))
    strategy.model_to_device()
    places = [{weight.device.type for weight in part.parameters()} for part in (module.text_encoder, module.unet)]
    assert places == [{encoder}, {denoiser}]


@pytest.mark.parametrize("kind", [AsyncDiffStrategy, PatchStrategy])
@pytest.mark.parametrize("shares", [False, True])
def test_the_setting_comes_through(kind, shares, monkeypatch):
    monkeypatch.setattr("asyncdiff_pl.strategies.base.parallelize", lambda pipe, **settings: settings)
    strategy = kind(share_encoding=shares)
    strategy._groups = Groups()
    settings = strategy.install(Module())
    assert settings["share_encoding"] is shares
    assert settings["share_decoding"] is True
