"""How the weights follow the gradients in every training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from asyncdiff_pl.training.learning_rate import warm_up_constant, warm_up_cosine


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a learning rate that rises at the start and then falls, or stays.

    Args:
        learning_rate: Highest learning rate.
        weight_decay: Decay of matrices and kernels; biases and norms have none.
        beta2: Decay of the mean square of the gradients.
        warm_up: Steps in which the learning rate rises.
        schedule: What comes then: `cosine` falls to 0 at `trainer.max_steps`, `constant` stays.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.99
    warm_up: int = 500
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warm_up < 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and warm_up {self.warm_up} steps; give above 0, and from 0."
            )

    def build(self, network: nn.Module, total: int, fused: bool = True) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns, for the parameters that are trained.

        Args:
            network: What is trained.
            total: Number of training steps, `trainer.max_steps`.
            fused: Take a step in a few kernels.

        Raises:
            ValueError: The number of steps is not known.
        """
        check_steps(total)
        parameters = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, self.beta2), fused=fused)
        follow = warm_up_constant if self.schedule == "constant" else partial(warm_up_cosine, total=total)
        schedule = LambdaLR(optimizer, partial(follow, warm_up=self.warm_up))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_steps(max_steps: int) -> None:
    """Tells that a training run has no end.

    Raises:
        ValueError: `trainer.max_steps` is not set.
    """
    if max_steps < 1:
        raise ValueError(
            f"trainer.max_steps is {max_steps}; give the number of training steps, `--trainer.max_steps 1000` say: "
            "the learning rate falls to 0 over them."
        )
