"""The progress bar of a predict run: samples, the step in work, its latency and the time left."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from asyncdiff_pl.callbacks.step_latency import Clock
from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

LINES = 8
"""Samples of a batch that have a line each in a log file; where there are more, the batch has one."""


class Measured(NamedTuple):
    """A batch that is done: its samples, its steps, the seconds in them and the seconds outside of them."""

    samples: int
    steps: float
    step_seconds: float
    other_seconds: float


class Pace:
    """Foresees how long the rest of a run takes: its steps at their pace, and what each sample costs besides.

    Args:
        planned: For each batch of the run the step counts of its samples.
    """

    def __init__(self, planned: Sequence[Sequence[int]]) -> None:
        self.planned = planned
        self._done: list[Measured] = []

    @property
    def samples_left(self) -> int:
        """Samples of the batches that are not done."""
        return sum(len(batch) for batch in self.planned[len(self._done) :])

    def finish(self, batch: Measured) -> None:
        """Says what the next batch took."""
        self._done.append(batch)

    def left(self, running: Measured) -> float | None:
        """Time left in s; None while nothing is known.

        Args:
            running: The batch in work so far; nothing of it between batches.
        """
        # the first batch holds one-time work: it counts only until there is another
        known = [*(self._done[1:] or self._done), running]
        samples, steps, step_seconds, other_seconds = (sum(column) for column in zip(*known, strict=True))
        if not steps:
            return None
        steps_left = sum(sum(calls(batch)) for batch in self.planned[len(self._done) :]) - running.steps
        other = other_seconds / samples if samples else 0.0
        return max(0.0, steps_left) * step_seconds / steps + self.samples_left * other


def calls(steps: Sequence[int]) -> list[int]:
    """Step counts of the calls that make a batch: neighbours with one step count share a call."""
    return [count for count, _ in itertools.groupby(steps)]


class _Mark(NamedTuple):
    """A moment of a batch: where a sample begins, or the end of a step with the batch's steps so far."""

    when: Any
    steps: float | None = None
    text: str = ""


class DiffusionProgressBar(TQDMProgressBar, TrajectoryListener):
    """Shows the samples of rank 0's data group, the step in work, the latest step's latency and the time left.

    The time left is about all samples of the group that are still to be made, each with its own step count. Steps count
    when the device is through with them, which on a GPU is after the CPU is. Where the output is no terminal there is
    one line a sample, and for a batch of more than 8 samples one line in all.

    Args:
        refresh_seconds: Least time in s between two updates of the bar.
    """

    def __init__(self, refresh_seconds: float = 0.1) -> None:
        super().__init__()
        if refresh_seconds < 0:
            raise ValueError(f"refresh_seconds is {refresh_seconds}; give a number of seconds from 0 up.")
        self.refresh_seconds = refresh_seconds
        self._file: TextIO = sys.stdout
        self._listening = False
        self._pace = Pace([])
        self._made = 0
        self._calls: list[int] = []
        self._call = -1
        self._running = Measured(0, 0, 0, 0)
        self._clock: Clock | None = None
        self._ahead: deque[_Mark] = deque()
        self._last: Any = None
        self._recent: deque[float] = deque(maxlen=4)
        self._latency = self._batch_end = self._refreshed = 0.0

    @override
    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a predict run; it draws nothing where the output is no terminal."""
        return Tqdm(
            desc="Generating",
            disable=self.is_disabled or not self._file.isatty(),
            dynamic_ncols=True,
            file=self._file,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file = sys.stdout
        super().on_predict_start(trainer, pl_module)
        if self.is_disabled:
            return
        self._clock = Clock(pl_module.device)
        self._pace = Pace(planned_steps(trainer, pl_module))
        self._made = 0
        self._batch_end = time.perf_counter()
        pl_module.trajectory.subscribe(self)
        self._listening = True
        self._draw()

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Sequence[Sample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._calls = calls([sample.steps or pl_module.num_inference_steps[0] for sample in batch])
        self._call = -1
        self._running = Measured(0, 0, 0, 0)
        # a strategy may have run the denoiser on its own before
        self._ahead.clear()

    @override
    def on_sample_begin(self, trajectory: Trajectory) -> None:
        assert self._clock is not None
        self._call = min(self._call + 1, len(self._calls) - 1)
        self._ahead.append(_Mark(self._clock.mark()))

    @override
    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        assert self._clock is not None
        # some schedulers step more often than they are asked to (Heun): what counts is how far the sample is
        share = (trajectory.position + 1) / trajectory.num_steps
        steps = sum(self._calls[: self._call]) + share * self._calls[self._call]
        text = f"step {trajectory.position + 1}/{trajectory.num_steps}"
        self._ahead.append(_Mark(self._clock.mark(), steps, text))
        self._catch_up()

    def _catch_up(self) -> None:
        """Counts the steps that the device is through with."""
        assert self._clock is not None
        text = ""
        while self._ahead and self._clock.is_past(self._ahead[0].when):
            mark = self._ahead.popleft()
            if mark.steps is not None:
                step_seconds = self._clock.milliseconds(self._last, mark.when) / 1000
                # over some steps: with stride 2 every second one takes no time
                self._recent.append(step_seconds)
                self._latency = sum(self._recent) / len(self._recent)
                self._running = Measured(0, mark.steps, self._running.step_seconds + step_seconds, 0)
                text = mark.text
            self._last = mark.when
        now = time.perf_counter()
        if text and now - self._refreshed >= self.refresh_seconds:
            self._refreshed = now
            self._draw(text)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[Prediction],
        batch: Sequence[Sample],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_disabled:
            return
        self._catch_up()
        now = time.perf_counter()
        in_steps = self._running.step_seconds
        # of all its steps: those of some layouts take nothing, and others the time of all
        self._latency = in_steps / sum(self._calls) if self._calls else 0.0
        self._pace.finish(Measured(len(outputs), sum(self._calls), in_steps, now - self._batch_end - in_steps))
        self._running = Measured(0, 0, 0, 0)
        self._batch_end = now
        self._made += len(outputs)
        self._draw()
        if not self._file.isatty() and len(outputs) > LINES:
            first, last = outputs[0], outputs[-1]
            what = f"{first.sample.id} to {last.sample.id} ({first.steps} steps): {first.seconds:.3g} s each"
            print(f"{self._made}/{self._total} {what}, {self._status()}", file=self._file, flush=True)
        elif not self._file.isatty():
            for number, prediction in enumerate(outputs, start=self._made - len(outputs) + 1):
                what = f"{prediction.sample.id} ({prediction.steps} steps): {prediction.seconds:.2f} s"
                print(f"{number}/{self._total} {what}, {self._status()}", file=self._file, flush=True)

    def tell(self, text: str) -> None:
        """Shows what goes on within a long step, for which neither a latency nor the time left is known.

        Args:
            text: A few words.
        """
        now = time.perf_counter()
        if now - self._refreshed >= self.refresh_seconds and not self.predict_progress_bar.disable:
            self._refreshed = now
            self.predict_progress_bar.set_postfix_str(text)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsubscribe(pl_module)
        super().on_predict_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unsubscribe(pl_module)
        if self._predict_progress_bar is not None:
            self.predict_progress_bar.close()

    @property
    def _total(self) -> int:
        # less than was planned where samples turned out unreadable
        return self._made + self._pace.samples_left

    def _status(self, step: str = "") -> str:
        left = self._pace.left(self._running)
        latency = f"{1000 * self._latency:.3g} ms a step" if self._latency < 1 else f"{self._latency:.2f} s a step"
        parts = (step, latency if self._latency else "", f"{Tqdm.format_interval(left)} left" if left else "")
        return ", ".join(part for part in parts if part)

    def _draw(self, step: str = "") -> None:
        bar = self.predict_progress_bar
        if not bar.disable:
            bar.n, bar.total = self._made, self._total
            bar.set_postfix_str(self._status(step))

    def _unsubscribe(self, pl_module: LightningModule) -> None:
        if self._listening:
            pl_module.trajectory.unsubscribe(self)
            self._listening = False


def planned_steps(trainer: Trainer, pl_module: LightningModule) -> list[list[int]]:
    """For each batch of this data group the step counts of its samples.

    They are the loader's `step_counts` if it has them (of the package's data modules); a batch of another loader is
    taken for one sample with the module's first step count.
    """
    (num_batches,) = trainer.num_predict_batches
    default = pl_module.num_inference_steps[0]
    counts = getattr(trainer.predict_dataloaders, "step_counts", None)
    if counts is None:
        return [] if math.isinf(num_batches) else [[default]] * int(num_batches)
    return [[steps or default for steps in batch] for batch in counts[: int(min(num_batches, len(counts)))]]
