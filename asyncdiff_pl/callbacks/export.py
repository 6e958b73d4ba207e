"""Writes the trained network at the end of a run, as the next config and the pipelines load it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import log_folder


class ExportWeights(Callback):
    """Writes the network, with averaged weights in float16, and its config.json at the end of training.

    Args:
        folder: Where to; `export` in the log folder if null.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._target = Path()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "export"):
            raise ValueError(
                f"{type(pl_module).__name__} has no method `export(folder)`, which writes what was trained; add one."
            )
        if self.folder is not None:
            self._target = Path(self.folder).expanduser()
        elif trainer.logger is None:
            raise ValueError("There is no log folder to export to; set trainer.logger, or export.folder.")
        else:
            self._target = log_folder(trainer) / "export"

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module.export(self._target)
            print(f"asyncdiff_pl: exported to {self._target}", flush=True)
        trainer.strategy.barrier()
