"""The checkpoint that training goes on from: every so many steps, at the end, and where the run is told to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from asyncdiff_pl.processes import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Where the state of a run lies in its log folder."""


class TrainingState(ModelCheckpoint):
    """Saves the whole state of training to checkpoints/last.ckpt in the log folder; `--resume FOLDER` goes on from it.

    After SIGTERM or Ctrl-C the batch in work is finished, the state is saved, and the run ends; a second signal ends
    the run at once. It is enough if one of several ranks gets the signal.

    Args:
        every_n_steps: Training steps from one save to the next.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; give a number of steps from 1 up.")
        super().__init__(
            filename=CHECKPOINT.stem,
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.every_n_steps = every_n_steps
        self._signal = 0
        self._before: dict[int, Any] = {}
        self._agreement = _Agreement()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._agreement = _Agreement()
        # Lightning asks rank 0 in every step, which makes each wait for its GPU; the agreement here does without
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        number = self._agreement.highest(self._signal)
        if number:
            self._save(trainer)
            self._restore_handlers()
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()
        self._save(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step != self._last_global_step_saved:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / CHECKPOINT.name)
            self._last_global_step_saved = trainer.global_step

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class _Agreement:
    """The highest number that any rank gives, known to all ranks at the same batch: one batch later, without waiting.

    It has a group of its own over the CPU, so that no rank waits for its GPU.
    """

    def __init__(self) -> None:
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if self._is_alone else dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, Any] | None = None

    def highest(self, number: int) -> int:
        """The highest number of the batch before; with one rank that of this batch."""
        if self._is_alone:
            return number
        tensor = torch.tensor([number], dtype=torch.int32)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._pending = self._pending, (tensor, work)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])
