"""The progress bar of a training run: steps, loss, pace and the time left."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override


class TrainingProgressBar(ProgressBar):
    """Shows the training steps done, the loss, steps and images a second and the time left; rank 0 shows it.

    Where the output is no terminal there is a line now and then.

    Args:
        refresh_seconds: Least time in s between two updates of the bar.
        line_seconds: Least time in s between two lines where there is no bar.
    """

    def __init__(self, refresh_seconds: float = 1.0, line_seconds: float = 15.0) -> None:
        super().__init__()
        for name, seconds in (("refresh_seconds", refresh_seconds), ("line_seconds", line_seconds)):
            if seconds < 0:
                raise ValueError(f"{name} is {seconds}; give a number of seconds from 0 up.")
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self._file: TextIO = sys.stdout
        self._bar: Tqdm | None = None
        self._enabled = True
        self._shown = self._started = self._paused = 0.0
        self._first = 0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file = sys.stdout
        self._started = self._shown = time.monotonic()
        self._first = trainer.global_step
        if self._enabled and trainer.is_global_zero and self._file.isatty():
            self._bar = Tqdm(
                desc="Training",
                total=trainer.max_steps,
                initial=trainer.global_step,
                dynamic_ncols=True,
                file=self._file,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, now = trainer.global_step, time.monotonic()
        if step == self._first + 1:
            # the first step holds one-time work
            self._started, self._paused = now, 0.0
        if not self._enabled or not trainer.is_global_zero:
            return
        is_last = step >= trainer.max_steps
        if not is_last and now - self._shown < (self.line_seconds if self._bar is None else self.refresh_seconds):
            return
        self._shown = now
        # reading the loss waits for the device: not in every step
        parts = [f"loss {float(outputs['loss']):.4f}"]
        pace = (step - self._first - 1) / max(1e-9, now - self._started - self._paused)
        if pace > 0:
            parts += [f"{pace:.1f} steps/s" if pace >= 1 else f"{1 / pace:.1f} s/step"]
            images = images_per_step(trainer)
            parts += [f"{pace * images:.0f} images/s"] if images else []
            parts += [f"{duration((trainer.max_steps - step) / pace)} left"]
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(", ".join(parts))
        else:
            print(f"step {step} of {trainer.max_steps}: {', '.join(parts)}", file=self._file, flush=True)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.monotonic()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._paused += time.monotonic() - self._validation_started
        if self._enabled and trainer.is_global_zero:
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("validation/")}
            text = ", ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in found.items())
            self.print(f"validation after step {trainer.global_step}: {text}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is None:
            print(*args, file=self._file, flush=True)
        else:
            self._bar.write(" ".join(map(str, args)), file=self._file)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def images_per_step(trainer: Trainer) -> int:
    """Images of an optimizer's step, on all ranks; 0 where the data module does not tell."""
    data = trainer.datamodule
    images = getattr(data, "batch_size", 0) * getattr(data, "num_frames", 1)
    return images * trainer.world_size * trainer.accumulate_grad_batches


def duration(seconds: float) -> str:
    """A time as `1 h 05 min`, `12 min 03 s` or `9 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
