"""The moving average of the weights: what is validated and exported."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override


class WeightAverage(WeightAveraging):
    """Keeps an exponential moving average of the weights, which validation and export take.

    It is Lightning's `WeightAveraging`, with all weights averaged in a few kernels on their own device and without
    waiting for it, all of which `EMAWeightAveraging` does otherwise. Over the first steps the average is shorter:
    min(decay, (1 + n) / (10 + n)), so that the random weights of the start are soon forgotten.

    Args:
        decay: Share of the average that a step keeps; 0.999 averages over some 1,000 steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; give a number from 0 to below 1.")
        super().__init__(use_buffers=False)
        self.decay = decay
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # the module goes to its device after this: the average would stay behind, and all weights travel in each step
        self._device = trainer.strategy.root_device
        self._pairs = None
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # it is asked for its value in each step
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # without training the module has the average itself, which checkpoints hold as the weights
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # not AveragedModel.update_parameters, which copies a number to the device, and waits for it
        steps, average = self._latest_update_step, self._average_model
        if trainer.global_step <= steps:
            return
        assert average is not None
        if self._pairs is None:
            self._pairs = [*average.module.parameters()], [p.detach() for p in pl_module.parameters()]
        if average.n_averaged == 0:
            torch._foreach_copy_(*self._pairs)
        else:
            torch._foreach_lerp_(*self._pairs, 1 - min(self.decay, (1 + steps) / (10 + steps)))
        for own, current in zip(average.module.buffers(), pl_module.buffers(), strict=True):
            own.copy_(current)
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step
