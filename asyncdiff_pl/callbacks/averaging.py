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

    It is Lightning's `WeightAveraging`, with all weights averaged in a few kernels and without waiting for the device,
    both of which `EMAWeightAveraging` does otherwise. Over the first steps the average is shorter: min(decay, (1 + n) /
    (10 + n)), so that the random weights of the start are soon forgotten.

    Args:
        decay: Share of the average that a step keeps; 0.999 averages over some 1,000 steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; give a number from 0 to below 1.")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # it is asked for its value in each step
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # without training the module has the average itself, which checkpoints hold as the weights
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @torch.no_grad()
    def _average(self, averages: Any, weights: Any, _: Tensor | int) -> None:
        steps = self._latest_update_step
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + steps) / (10 + steps)))
