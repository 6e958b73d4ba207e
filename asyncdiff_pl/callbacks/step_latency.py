"""How long each denoising step takes, measured where the denoiser is called and its scheduler steps."""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import SampleCount, gather, is_leader, log_folder, tensorboard
from asyncdiff_pl.callbacks.sample_table import cell, read_table, write_table
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel import Parallel
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

log = logging.getLogger(__name__)


class Clock:
    """When a device comes past marks; a GPU comes there after the CPU set them, and nothing waits for it.

    Args:
        device: Where the denoiser computes. On a GPU the marks are CUDA events in the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Sets a mark."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """Whether the device is past a mark."""
        return not self._on_gpu or mark.query()

    def wait(self, mark: Any) -> None:
        """Waits until the device is past a mark."""
        if self._on_gpu:
            mark.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks that the device is past, in ms."""
        return start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)


class Stopwatch(TrajectoryListener):
    """Takes the time of every step of every run of a pipeline.

    A step lasts from the end of the step before to the end of its `scheduler.step`; the first one from its first
    denoiser call on.

    Args:
        device: Where the denoiser computes.
        handle: What a strategy installed on the denoiser, if any: it tells which steps were exact.
    """

    def __init__(self, device: torch.device, handle: Parallel | None = None) -> None:
        self._clock = Clock(device)
        self.exact_steps: list[int] = []
        """Exact steps of each run since the last reading, in order; empty where all are."""
        self._handle = handle if handle is not None and handle.layout.ranks_per_half > 1 else None
        self._runs: list[list[Any]] = []

    @override
    def on_sample_begin(self, trajectory: Trajectory) -> None:
        self._runs.append([self._clock.mark()])
        if self._handle is not None:
            self.exact_steps.append(0)

    @override
    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        self._runs[-1].append(self._clock.mark())
        if self._handle is not None:
            self.exact_steps[-1] = self._handle.exact_steps

    def read(self) -> list[list[float]]:
        """Step times in ms of each run since the last reading, in order."""
        runs, self._runs, self.exact_steps = self._runs, [], []
        if runs:
            self._clock.wait(runs[-1][-1])
        return [[self._clock.milliseconds(a, b) for a, b in itertools.pairwise(marks)] for marks in runs]


class Moments(NamedTuple):
    """What is known of some times in ms: how many, their mean and their population standard deviation."""

    count: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Moments of some values, at least one."""
        return cls(len(values), float(np.mean(values)), float(np.std(values)))

    def __or__(self, other: Moments) -> Moments:
        """Moments of both together."""
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        squares = sum(m.count * (m.std**2 + (m.mean - mean) ** 2) for m in (self, other))
        return Moments(count, mean, float(np.sqrt(squares / count)))


class StepLatency(Callback):
    """Sets `step_latency_ms` of each prediction, its mean time of a step in ms, and logs every step.

    With stages, patches or several steps at a time it sets `exact_steps` as well, how many of the steps were computed
    exactly (warm-up and refreshes).

    TensorBoard shows, of rank 0's data group, the histogram `step_latency_ms/steps=<n>` and the seconds of each call,
    `call_seconds/steps=<n>`; at the end, of all data groups, the curve over the steps,
    `step_latency_ms/curve/steps=<n>`. The curve is in `latency.csv` too. Samples that are not timed are left out of all
    of these. A call that makes several samples at once has the same steps for all of them.
    """

    def __init__(self) -> None:
        self._stopwatch: Stopwatch | None = None
        self._folder: Path | None = None
        self._count = SampleCount()
        self._times: defaultdict[int, list[list[float]]] = defaultdict(list)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch = Stopwatch(pl_module.device, getattr(trainer.strategy, "handle", None))
        pl_module.trajectory.subscribe(self._stopwatch)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._stopwatch is not None
        self._stopwatch.read()  # a strategy may have run the denoiser on its own before

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._stopwatch is not None
        writer = tensorboard(trainer)
        exact_steps = self._stopwatch.exact_steps
        for run, (predictions, times) in enumerate(assign(outputs, self._stopwatch.read())):
            if predictions[0].timed and is_leader(trainer):
                self._times[predictions[0].steps].append(times)
            for prediction in predictions:
                prediction.metrics["step_latency_ms"] = float(np.mean(times))
                if exact_steps:
                    prediction.metrics["exact_steps"] = exact_steps[run]
                number = self._count.next(trainer, prediction.steps)
                if writer is not None and prediction.timed:
                    writer.add_histogram(f"step_latency_ms/steps={prediction.steps}", np.array(times), number)
                    writer.add_scalar(f"call_seconds/steps={prediction.steps}", prediction.seconds, number)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsubscribe(pl_module)
        parts = gather(trainer, dict(self._times))
        if parts is None:
            return
        assert self._folder is not None
        curves = {n: curve([times for part in parts for times in part.get(n, [])]) for n in sorted(set().union(*parts))}
        writer = tensorboard(trainer)
        for steps, moments in curves.items():
            for index, moment in enumerate(moments) if writer is not None else ():
                writer.add_scalar(f"step_latency_ms/curve/steps={steps}", moment.mean, index)
        write_curves(self._folder / "latency.csv", curves)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unsubscribe(pl_module)

    def _unsubscribe(self, pl_module: LightningModule) -> None:
        if self._stopwatch is not None:
            pl_module.trajectory.unsubscribe(self._stopwatch)
            self._stopwatch = None


def assign(
    predictions: Sequence[Prediction], runs: Sequence[list[float]]
) -> list[tuple[list[Prediction], list[float]]]:
    """Tells which predictions each run of the pipeline made.

    Args:
        predictions: What a batch gave, in order.
        runs: Step times of each run of the pipeline, in order.

    Returns:
        For each run its predictions: those of one call, or one prediction a run. Empty, with a warning, where it is
        neither, so that nobody gets the times of another.
    """
    in_order = sorted(predictions, key=lambda p: p.call)
    groups = [list(group) for _, group in itertools.groupby(in_order, key=lambda p: p.call)]
    if len(runs) == len(groups):
        return list(zip(groups, runs, strict=True))
    if len(runs) == len(predictions):
        return [([p], run) for p, run in zip(in_order, runs, strict=True)]
    log.warning(
        "%d samplings were seen for %d samples in %d calls; this batch is without step latencies.",
        len(runs),
        len(predictions),
        len(groups),
    )
    return []


def curve(samples: Iterable[list[float]]) -> list[Moments]:
    """Moments of the first, second, ... step over some samples."""
    columns = itertools.zip_longest(*samples)
    return [Moments.of([time for time in column if time is not None]) for column in columns]


def write_curves(path: Path, curves: dict[int, list[Moments]]) -> None:
    """Writes the times of each step as a table, together with what earlier runs into this folder measured.

    Args:
        path: The table; columns steps, step, mean_ms, std_ms (population), count.
        curves: For each step count the moments of each step.
    """
    rows = {(n, step): moments for n, line in curves.items() for step, moments in enumerate(line)}
    for row in read_table(path):
        key = int(row["steps"]), int(row["step"])
        before = Moments(int(row["count"]), float(row["mean_ms"]), float(row["std_ms"]))
        rows[key] = rows[key] | before if key in rows else before
    columns = ["steps", "step", "mean_ms", "std_ms", "count"]
    cells = [(n, step, m.mean, m.std, m.count) for (n, step), m in sorted(rows.items())]
    write_table(path, [dict(zip(columns, map(cell, values), strict=True)) for values in cells], columns)
