"""What `validate` leaves behind: a line in the terminal and a row in validation.csv."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import log_folder
from asyncdiff_pl.callbacks.sample_table import cell, write_table
from asyncdiff_pl.models.training.base import counted


class ValidationTable(Callback):
    """Prints the measures of a checkpoint, and writes them to `validation.csv` in the log folder.

    Columns: the checkpoint, its training step, the number of pictures or clips on all ranks, and each measure.
    """

    def __init__(self) -> None:
        self._pictures = 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pictures = 0

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._pictures += counted(batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = log_folder(trainer)
        pictures = trainer.strategy.reduce(torch.tensor(self._pictures, device=pl_module.device), reduce_op="sum")
        if not trainer.is_global_zero:
            return
        row = {"checkpoint": trainer.ckpt_path, "step": trainer.global_step, "pictures": int(pictures)}
        row |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("validation/")}
        write_table(folder / "validation.csv", [{name: cell(value) for name, value in row.items()}], list(row))
        shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        widths = {name: max(len(name), len(text)) for name, text in shown.items()}
        print("  ".join(name.rjust(width) for name, width in widths.items()))
        print("  ".join(shown[name].rjust(width) for name, width in widths.items()))
        print(f"results: {folder}", flush=True)
