"""All states of each sample between noise and result, as files: to look at, or to begin another sample with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.callbacks.roles import is_leader, log_folder
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel.steps.twin import first_tensor
from asyncdiff_pl.parallel.time.saved import SavedTrajectory, trajectory_path
from asyncdiff_pl.parallel.time.solving import as_states, coefficients_of
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.sampling import StepCoefficients


class TrajectoryWriter(Callback, TrajectoryListener):
    """Saves the states that each sample goes through, whatever the strategy.

    `trajectories/steps=<n>/<id>.safetensors` has `states` [N + 1, ...], number 0 being the result and N the noise, in
    the scale in which the denoiser is given them, with steps, scheduler and timesteps as metadata. Schedulers: DDIM,
    DDPM and Euler. TimeParallelStrategy begins with them (`initial_trajectory`).

    Args:
        save: Whether all states of each sample, its intermediates, are saved to `trajectories/` in the log folder: for
            another run's `initial_trajectory`, say.
    """

    def __init__(self, save: bool = False) -> None:
        self.save = save
        self._folder: Path | None = None
        self._module: LightningModule | None = None
        self._coefficients: StepCoefficients | None = None
        self._latents: list[torch.Tensor] = []
        self._found: dict[int, SavedTrajectory] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save and is_leader(trainer):
            self._module = pl_module
            pl_module.trajectory.subscribe(self)

    @override
    def on_sample_begin(self, trajectory: Trajectory) -> None:
        self._latents.clear()

    @override
    def on_step_begin(self, trajectory: Trajectory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if trajectory.position > 0:
            return
        scheduler = trajectory.scheduler
        step = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
        try:
            self._coefficients = coefficients_of(scheduler, step, trajectory.num_steps)
        except ValueError as error:
            raise ValueError(f"trajectories.save is true, but no run could begin with such states: {error}") from error
        assert self._module is not None
        rows, samples = len(step["sample"]), len(self._module.samples_in_work)
        # some pipelines step both halves of the guidance batch
        if rows not in (samples, 2 * samples):
            raise ValueError(
                f"trajectories.save is true, but {rows} latents are denoised at a time for {samples} samples, and it "
                "is not known whose they are: leave it false, or take a batch_size of 1."
            )
        self._latents.append(step["sample"].detach().clone())

    @override
    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        if not self._latents:
            return
        self._latents.append(first_tensor(output).detach().clone())
        if trajectory.position + 1 < trajectory.num_steps:
            return
        assert self._module is not None and self._coefficients is not None
        scales = self._coefficients.latent_scales.flip(0)
        states = [as_states(*pair) for pair in zip(self._latents, scales, strict=True)]
        timesteps = self._coefficients.timesteps.flip(0).tolist()
        self._latents.clear()
        for row, sample in enumerate(self._module.samples_in_work):
            of_sample = torch.stack([state[row] for state in reversed(states)])
            self._found[id(sample)] = SavedTrajectory(of_sample, timesteps, type(trajectory.scheduler).__name__)

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
        for prediction in outputs if self._found else ():
            assert self._folder is not None
            path = trajectory_path(self._folder, prediction.steps, prediction.sample.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self._found.pop(id(prediction.sample)).encode())

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsubscribe()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._module is not None:
            self._module.trajectory.unsubscribe(self)
            self._module = None
