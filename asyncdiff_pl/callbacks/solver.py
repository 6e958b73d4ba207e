"""What the solvers of a run that is parallel in time came to: iterations, evaluations, residuals and trajectories."""

from __future__ import annotations

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
from asyncdiff_pl.callbacks.roles import SampleCount, gather, is_leader, log_folder, tensorboard
from asyncdiff_pl.callbacks.sample_table import Row, cell, key_of, read_table, write_table
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel import Solved
from asyncdiff_pl.parallel.time.saved import SavedTrajectory, trajectory_path
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.sampling import Iteration

COLUMNS = ("steps", "id", "iteration", "evaluated", "residual")
"""Columns of iterations.csv."""

PICTURE_DIMS = 4
"""Dimensions of a picture's states; a video's have one more, and are not drawn."""


class _Listener(TrajectoryListener):
    """Keeps what each run of the pipeline came to.

    Args:
        strategy: Its handle tells.
    """

    def __init__(self, strategy: Any) -> None:
        self.runs: list[Solved] = []
        self.snapshots: list[list[list[iteration_sheet.Snapshot]]] = []
        """For each run, if it was watched, and each of its samples those of all iterations."""
        self._strategy = strategy

    def watch(self, is_wanted: bool) -> None:
        """Has iterations kept from now on, or not."""
        handle = getattr(self._strategy, "handle", None)
        if handle is not None:
            handle.watch_iterations(self._keep if is_wanted else None)

    def _keep(self, iteration: Iteration) -> None:
        samples = range(len(iteration.trajectories))
        if iteration.number == 1:
            self.snapshots.append([[] for _ in samples])
        for sample in samples if iteration.trajectories[0].ndim == PICTURE_DIMS else ():
            self.snapshots[-1][sample].append(iteration_sheet.take(iteration, sample))

    @override
    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        handle = getattr(self._strategy, "handle", None)
        if handle is not None and handle.solved is not None and trajectory.position + 1 == trajectory.num_steps:
            self.runs.append(handle.solved)


class SolverProgress(Callback):
    """Tells what a strategy that is parallel in time did; with other strategies it does nothing.

    Sets of each prediction: `iterations`; `denoiser_calls`, the states that the denoiser was given, to be compared with
    the number of steps; `residual`, the largest of the last iteration; and `unfinished_states`, above 0 where the
    iterations did not suffice. `iterations.csv` has a row for each iteration of each sample: how many states were
    evaluated, and their largest residual. TensorBoard shows, of rank 0's data group, `solver/iterations/steps=<n>`
    over the samples, and, of all data groups at the end, the mean residual over the iterations,
    `solver/residual/steps=<n>`.

    With the strategy's `save_trajectories` `trajectories/steps=<n>/<id>.safetensors` has each sample's states as well:
    `states` [N + 1, ...], number 0 being the result and N the noise, in the scale in which the denoiser is given them,
    with steps, scheduler and timesteps as metadata.

    Args:
        sheets: Of how many of the first samples of each data group a sheet is drawn to
            `iterations/steps=<n>/<id>.png`: rows are iterations, columns are states from noise to result, decoded as
            they are. Pictures only, no videos; it takes the time of decoding.
    """

    def __init__(self, sheets: int = 0) -> None:
        if sheets < 0:
            raise ValueError(f"sheets is {sheets}; give 0 (none) or more.")
        self.sheets = sheets
        self._num_drawn = 0
        self._listener: _Listener | None = None
        self._folder: Path | None = None
        self._count = SampleCount()
        self._rows: list[Row] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listener = _Listener(trainer.strategy)
        pl_module.trajectory.subscribe(self._listener)
        self._listener.watch(self.sheets > 0)

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
                self._keep(trainer, prediction, solved, index)
            if iterations and self._num_drawn < self.sheets:
                self._draw(trainer, pl_module, prediction, solved, iterations)
        self._listener.watch(self._num_drawn < self.sheets)

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

    def _keep(self, trainer: Trainer, prediction: Prediction, solved: Solved, index: int) -> None:
        for iteration, residuals in enumerate(solved.residuals[index], 1):
            evaluated = int((~residuals.isnan()).sum())
            values = (prediction.steps, prediction.sample.id, iteration, evaluated, _largest(residuals))
            self._rows.append(dict(zip(COLUMNS, map(cell, values), strict=True)))
        if getattr(trainer.strategy, "save_trajectories", False):
            assert self._folder is not None
            path = trajectory_path(self._folder, prediction.steps, prediction.sample.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            saved = SavedTrajectory(solved.trajectory[index], solved.timesteps, solved.scheduler)
            write_atomically(path, saved.encode())

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsubscribe(pl_module)
        parts = gather(trainer, self._rows)
        if parts is None or not any(parts):
            return
        assert self._folder is not None
        new = [row for rows in parts for row in rows]
        again = {key_of(row) for row in new}
        before = [row for row in read_table(self._folder / "iterations.csv") if key_of(row) not in again]
        write_table(self._folder / "iterations.csv", [*before, *new], COLUMNS)
        writer = tensorboard(trainer)
        residuals = defaultdict(list)
        for row in new:
            residuals[row["steps"], int(row["iteration"])].append(float(row["residual"]))
        for (steps, iteration), values in sorted(residuals.items()) if writer is not None else ():
            writer.add_scalar(f"solver/residual/steps={steps}", sum(values) / len(values), iteration)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unsubscribe(pl_module)

    def _unsubscribe(self, pl_module: LightningModule) -> None:
        if self._listener is not None:
            self._listener.watch(False)
            pl_module.trajectory.unsubscribe(self._listener)
            self._listener = None


def _largest(residuals: torch.Tensor) -> float:
    """The largest of one iteration, among the states that were evaluated."""
    return float(residuals[~residuals.isnan()].max())
