"""Whole steps of a training on a GPU, the data's and the callbacks' parts included, never wait for the GPU."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from asyncdiff_pl.callbacks import WeightAverage
from asyncdiff_pl.data import Cifar10
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.training.loss_weights import LearnedUncertainty
from asyncdiff_pl.training.timesteps import AdaptiveTimesteps, BetaPolicy, LossSecondMoment, SpeeD, UniformTimesteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Watch(Callback):
    """Makes any wait an error, from the fourth step's start to the sixth one's end."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings",
    [
        {"timesteps": UniformTimesteps(), "capture": True},
        {"timesteps": SpeeD(), "weight": LearnedUncertainty()},
        {"timesteps": LossSecondMoment(), "variance": "learned_range", "loss": "hybrid"},
        {"timesteps": AdaptiveTimesteps()},
        {"timesteps": BetaPolicy()},
    ],
    ids=lambda settings: type(settings["timesteps"]).__name__,
)
def test_no_step_waits(settings, tmp_path):
    np.savez(tmp_path / "train.npz", images=np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8))
    module = DDPM(channels=32, multipliers=(1, 2), blocks=1, attention=(16,), channels_last=True, **settings)
    average = WeightAverage()
    trainer = Trainer(
        max_steps=8,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        benchmark=True,
        callbacks=[average, Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=Cifar10(str(tmp_path), batch_size=16))
    assert trainer.global_step == 8
    assert next(average._average_model.module.parameters()).is_cuda
