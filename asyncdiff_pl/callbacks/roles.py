"""What a rank does for the callbacks: who writes, which data group it belongs to, and how the ranks' findings meet.

A callback must not call a collective in a batch hook: data groups may differ by one batch. What the groups found meets
once, with `gather`, when all ranks are at the end of the loop.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def is_leader(trainer: Trainer) -> bool:
    """Whether this rank scores and writes for the ranks that run the same samples."""
    return getattr(trainer.strategy, "is_group_leader", True)


def data_rank(trainer: Trainer) -> int:
    """Number of this rank's data group, from 0: the ranks of one group run the same samples."""
    return getattr(trainer.strategy, "data_rank", trainer.global_rank)


def data_size(trainer: Trainer) -> int:
    """Number of data groups."""
    return getattr(trainer.strategy, "data_size", trainer.world_size)


def gather(trainer: Trainer, obj: Any) -> list[Any] | None:
    """Brings an object of each rank to rank 0; every rank must call it.

    Args:
        trainer: Tells which rank this is.
        obj: What this rank has; it must be picklable.

    Returns:
        On rank 0 the objects by rank, on the others None.
    """
    if trainer.world_size == 1:
        return [obj]
    objects: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object(obj, objects)
    return objects


def tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """The TensorBoard writer on rank 0; None on other ranks and where no TensorBoard logger is set."""
    if not trainer.is_global_zero:
        return None
    loggers = (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    return next((logger.experiment for logger in loggers), None)


def log_folder(trainer: Trainer) -> Path:
    """Folder of the run, the same on all ranks; every rank must call it."""
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)


def run_metrics(trainer: Trainer) -> dict[str, float]:
    """What callbacks measured of the whole run: their `run_metrics` put together; each becomes a column."""
    return {k: v for callback in trainer.callbacks for k, v in getattr(callback, "run_metrics", {}).items()}


def step_metrics(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What callbacks measured of all samples of a step count: their `step_metrics` put together, as columns as well."""
    found: dict[int, dict[str, float]] = {}
    for callback in trainer.callbacks:
        for steps, columns in getattr(callback, "step_metrics", {}).items():
            found[steps] = found.get(steps, {}) | columns
    return found


class SampleCount:
    """Numbers the samples of each step count: the x-axis of what is logged once a sample.

    A run that goes on where another stopped goes on counting, if a callback knows how much is `done`.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def next(self, trainer: Trainer, steps: int) -> int:
        """Number of this sample among those of its step count in this data group, from 0."""
        before = sum(
            n == steps for callback in trainer.callbacks for n, _ in getattr(callback, "done", ())
        ) // data_size(trainer)
        self._counts[steps] += 1
        return before + self._counts[steps] - 1
