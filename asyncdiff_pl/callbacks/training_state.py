"""The checkpoint that training goes on from: every so many steps, at the end, and where the run is told to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import log_folder
from asyncdiff_pl.processes import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Where the state of a run lies in its log folder."""


class TrainingState(Checkpoint):
    """Saves the whole state of training to checkpoints/last.ckpt in the log folder; `--resume FOLDER` goes on from it.

    After SIGTERM or Ctrl-C the batch in work is finished, the state is saved, and the run ends; a second signal ends
    the run at once. It is enough if one of several ranks gets the signal.

    Args:
        every_n_steps: Training steps from one save to the next.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; give a number of steps from 1 up.")
        self.every_n_steps = every_n_steps
        self._path = Path()
        self._saved = 0
        self._signal = 0
        self._before: dict[int, Any] = {}
        self._agreement: _Agreement | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.logger is None:
            raise ValueError("Training saves its state to the log folder; set trainer.logger to a TensorBoardLogger.")
        self._path = log_folder(trainer) / CHECKPOINT

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._signal = trainer.global_step, 0
        self._agreement = _Agreement()
        # Lightning asks rank 0 in every step, which makes each rank wait for its GPU; the agreement does without
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._agreement is not None
        step, number = trainer.global_step, self._agreement.highest(self._signal)
        is_due = step % self.every_n_steps == 0 or step >= trainer.max_steps
        if (is_due or number) and step != self._saved:
            trainer.save_checkpoint(self._path)
            self._saved = step
        if number:
            self._restore_handlers()
            if trainer.is_global_zero:
                print(f"asyncdiff_pl: state saved after step {step}; `fit --resume {self._path.parents[1]}` goes on.")
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

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
