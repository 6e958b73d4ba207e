"""Strategies in worlds of their own making: what the tests of them share."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from asyncdiff_pl.data import CocoCaptions


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    rank_zero_only.rank = 0


def over(strategy, devices, nodes=1, rank=0):
    """A strategy that takes itself for one rank of a world; no process is started."""
    environment = LightningEnvironment()
    environment.set_world_size(devices * nodes)
    environment.set_global_rank(rank)
    strategy.cluster_environment = environment
    strategy.parallel_devices = [torch.device("cpu")] * devices
    strategy.num_nodes = nodes
    return strategy


def predict(module, strategy, images=1, size=64):
    """What a module makes of the demo's pictures in this process, frame by frame."""
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        logger=False,
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = CocoCaptions("demo", "demo", max_images=images, height=size, width=size)
    batches = trainer.predict(module, data)
    return [frame.tobytes() for (prediction,) in batches for frame in prediction.frames]
