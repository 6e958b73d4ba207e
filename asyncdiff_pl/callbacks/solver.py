"""What the solvers of a run that is parallel in time came to: iterations, evaluations and residuals."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks import iteration_sheet
from asyncdiff_pl.callbacks.frame_files import encode_png, write_atomically
from asyncdiff_pl.callbacks.progress import DiffusionProgressBar
from asyncdiff_pl.callbacks.roles import SampleCount, data_rank, gather, is_leader, log_folder, tensorboard
from asyncdiff_pl.callbacks.sample_table import PartFile, Row, cell, key_of, read_table, write_table
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel import Solved
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.sampling import Iteration
from asyncdiff_pl.strategies import TimeParallelStrategy

COLUMNS = ("steps", "id", "iteration", "evaluated", "residual")
"""Columns of iterations.csv."""


class _Listener(TrajectoryListener):
    """Keeps what each run of the pipeline came to.

    Args:
        trainer: Its strategy's handle tells, and its progress bar shows the iteration in work.
        pl_module: Its pipeline is that whose states are kept.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.runs: list[Solved] = []
        self.snapshots: list[list[list[iteration_sheet.Snapshot]]] = []
        """For each run, if it was watched, and each of its samples those of all iterations."""
        self.draws = False
        """Whether snapshots are taken."""
        self._trainer = trainer
        self._pl_module = pl_module

    @property
    def handle(self) -> Any:
        """What the strategy installed; None for a strategy without."""
        return getattr(self._trainer.strategy, "handle", None)

    def watch(self, hears: bool) -> None:
        """Has iterations told from now on, or not."""
        if self.handle is not None:
            self.handle.watch_iterations(self._keep if hears else None)

    def _keep(self, iteration: Iteration) -> None:
        bar = self._trainer.progress_bar_callback
        if isinstance(bar, DiffusionProgressBar):
            bar.tell(f"iteration {iteration.number}, states left: {max(iteration.finished)}")
        if not self.draws:
            return
        samples = range(len(iteration.trajectories))
        if iteration.number == 1:
            self.snapshots.append([[] for _ in samples])
        for sample in samples:
            self.snapshots[-1][sample].append(iteration_sheet.take(iteration, sample, self._pl_module.pipeline))

    @override
    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        handle = self.handle
        if handle is not None and handle.solved is not None and trajectory.position + 1 == trajectory.num_steps:
            self.runs.append(handle.solved)


class SolverProgress(Callback):
    """Tells what a strategy that is parallel in time did; with other strategies it does nothing.

    Sets of each prediction: `iterations`; `denoiser_calls`, the states that the denoiser was given, to be compared with
    the number of steps; `residual`, the largest of the last iteration; and `unfinished_states`, above 0 where the
    iterations did not suffice. `iterations.csv` has a row for each iteration of each sample: how many states were
    evaluated, and their largest residual; of samples that are done (until the run ends, each data group has a file
    `iterations.part<k>.csv`). TensorBoard shows, of rank 0's data group, `solver/iterations/steps=<n>`
    over the samples, and, of all data groups at the end, the mean residual over the iterations,
    `solver/residual/steps=<n>`.

    Args:
        sheets: Of how many of the first samples of each data group a sheet is drawn to
            `iterations/steps=<n>/<id>.png`: rows are iterations, columns are states from noise to result, decoded as
            they are, of a video the frame in the middle. It takes the time of decoding, and is for strategies that are
            parallel in time alone.
    """

    def __init__(self, sheets: int = 0) -> None:
        if sheets < 0:
            raise ValueError(f"sheets is {sheets}; give 0 (none) or more.")
        self.sheets = sheets
        self._num_drawn = 0
        self._listener: _Listener | None = None
        self._folder: Path | None = None
        self._count = SampleCount()
        self._part: PartFile | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        if self.sheets and not isinstance(trainer.strategy, TimeParallelStrategy):
            raise ValueError(
                f"solver.sheets is {self.sheets}, but {type(trainer.strategy).__name__} has no iterations to draw: "
                "take TimeParallelStrategy, or leave it at 0."
            )
        self._folder = log_folder(trainer)
        path = self._folder / f"iterations.part{data_rank(trainer)}.csv"
        self._part = PartFile(path, lambda rows: list(COLUMNS))
        if trainer.is_global_zero:
            # what a run that was stopped has left
            _put_together(self._folder)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listener = _Listener(trainer, pl_module)
        self._listener.draws = self.sheets > 0
        pl_module.trajectory.subscribe(self._listener)
        self._listener.watch(True)

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
        assert self._listener is not None
        runs, self._listener.runs = self._listener.runs, []
        snapshots, self._listener.snapshots = self._listener.snapshots, []
        found = [(solved, index) for solved in runs for index in range(len(solved.iterations))]
        in_order = sorted(outputs, key=lambda prediction: prediction.call)
        # samples of a single step are not solved
        in_order = [prediction for prediction in in_order if prediction.steps > 1]
        if len(found) != len(in_order):
            return
        taken = [of_sample for of_run in snapshots for of_sample in of_run] or [[] for _ in found]
        for prediction, (solved, index), iterations in zip(in_order, found, taken, strict=True):
            self._tell(trainer, prediction, solved, index)
            if is_leader(trainer):
                self._keep(prediction, solved, index)
            if iterations and self._num_drawn < self.sheets:
                self._draw(trainer, pl_module, prediction, solved, iterations)
        self._listener.draws = self._num_drawn < self.sheets

    def _draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Prediction,
        solved: Solved,
        iterations: Sequence[iteration_sheet.Snapshot],
    ) -> None:
        self._num_drawn += 1
        # on all ranks: they share out decoding
        sheet = iteration_sheet.draw(iterations, solved.scales, pl_module.pipeline)
        if is_leader(trainer):
            assert self._folder is not None
            name = f"{quote(prediction.sample.id, safe=' ')}.png"
            path = self._folder / "iterations" / f"steps={prediction.steps}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, encode_png(sheet))

    def _tell(self, trainer: Trainer, prediction: Prediction, solved: Solved, index: int) -> None:
        residuals = solved.residuals[index]
        prediction.metrics["iterations"] = solved.iterations[index]
        prediction.metrics["denoiser_calls"] = solved.denoiser_calls[index]
        prediction.metrics["residual"] = _largest(residuals[-1])
        prediction.metrics["unfinished_states"] = solved.unfinished[index]
        number = self._count.next(trainer, prediction.steps)
        writer = tensorboard(trainer)
        if writer is not None:
            name = f"solver/iterations/steps={prediction.steps}"
            writer.add_scalar(name, solved.iterations[index], number)

    def _keep(self, prediction: Prediction, solved: Solved, index: int) -> None:
        assert self._part is not None
        rows = []
        for iteration, residuals in enumerate(solved.residuals[index], 1):
            evaluated = int((~residuals.isnan()).sum())
            values = (prediction.steps, prediction.sample.id, iteration, evaluated, _largest(residuals))
            rows.append(dict(zip(COLUMNS, map(cell, values), strict=True)))
        self._part.append(*rows)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsubscribe(pl_module)
        assert self._part is not None and self._folder is not None
        self._part.close()
        # the rows themselves meet, not only their files: data groups need not share a disk
        parts = gather(trainer, self._part.rows)
        if parts is None or not any(parts):
            return
        new = [row for rows in parts for row in rows]
        _put_together(self._folder, new)
        writer = tensorboard(trainer)
        residuals = defaultdict(list)
        for row in new:
            residuals[row["steps"], int(row["iteration"])].append(float(row["residual"]))
        for (steps, iteration), values in sorted(residuals.items()) if writer is not None else ():
            writer.add_scalar(f"solver/residual/steps={steps}", sum(values) / len(values), iteration)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unsubscribe(pl_module)
        if self._part is not None:
            self._part.close()

    def _unsubscribe(self, pl_module: LightningModule) -> None:
        if self._listener is not None:
            self._listener.watch(False)
            pl_module.trajectory.unsubscribe(self._listener)
            self._listener = None


def _put_together(folder: Path, new: Sequence[Row] = ()) -> None:
    """Puts `iterations.csv`, all part files and some rows together, and removes the part files.

    Args:
        folder: Log folder of the run.
        new: Rows that may not be on this disk; of a sample that was made twice the later ones count.
    """
    path, parts = folder / "iterations.csv", sorted(folder.glob("iterations.part*.csv"))
    of_sample: dict[tuple[int, str], list[Row]] = {}
    for table in (read_table(path), *map(read_table, parts), new):
        of_sample |= {key: list(rows) for key, rows in itertools.groupby(table, key_of)}
    if of_sample:
        write_table(path, [row for rows in of_sample.values() for row in rows], COLUMNS)
    for part in parts:
        part.unlink()


def _largest(residuals: torch.Tensor) -> float:
    """The largest of one iteration, among the states that were evaluated."""
    return float(residuals[~residuals.isnan()].max())
