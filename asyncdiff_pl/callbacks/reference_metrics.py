"""Compares each prediction with the same sample of a reference run: PSNR, SSIM and LPIPS."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import SampleCount, gather, is_leader, tensorboard
from asyncdiff_pl.callbacks.written_frames import frames_of, read_frames, step_counts
from asyncdiff_pl.metrics.frames import compare_frames
from asyncdiff_pl.metrics.lpips import LPIPS, check_lpips, load_lpips
from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.models.base import Prediction

log = logging.getLogger(__name__)


class ReferenceMetrics(Callback):
    """Sets `psnr_db`, `ssim`, `lpips` and `equal` of each prediction, against a reference run's frames.

    They are compared with the frames of the same step count and id, over all frames of a sample; `equal` is 1 where all
    pixels are the same, and there PSNR is infinite: its averages are those of the other samples. Samples that the
    reference lacks have no such numbers, and their number is said at the end. TensorBoard shows the samples of rank 0's
    data group as `reference/<metric>/steps=<n>`.

    Args:
        folder: Log folder of the reference run, with its frames as PNG; null compares nothing.
        ssim: Whether SSIM is taken; it needs pictures of 11 x 11 pixels or more.
        lpips: Path of AlexNet's weights as torchvision has them (`alexnet-owt-7be5be79.pth`) for LPIPS, or `fetch` to
            have them fetched; null leaves LPIPS out.
    """

    def __init__(self, folder: str | None = None, ssim: bool = True, lpips: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.ssim = ssim
        self.lpips = lpips
        self.described: dict[str, str] = {} if self.folder is None else {"reference": str(self.folder.resolve())}
        """What a row of results.csv says of the reference; runs of one log folder share it."""
        self._network: LPIPS | None = None
        self._count = SampleCount()
        self._compared = 0
        self._missing: list[tuple[int, str]] = []

    def check(self) -> None:
        """Tells early that there is no such reference.

        Raises:
            ValueError: The folder is missing or holds no frames, or there are no such weights.
        """
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder} to compare with; give a run's log folder.")
        if not step_counts(self.folder):
            raise ValueError(f"{self.folder} holds no frames; give the log folder of a run that wrote them as PNG.")
        if self.lpips is not None:
            check_lpips(self.lpips)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" or self.folder is None:
            return
        self.check()
        if self.lpips is None:
            return
        problem = None
        try:
            # the first rank of each node goes first, so that a download happens once a node
            if trainer.local_rank == 0:
                self._network = load_lpips(self.lpips)
        except MissingNetwork as error:
            problem = str(error)
        # all ranks do the same, or a part of the samples would have the column
        problem = trainer.strategy.broadcast(problem)
        if problem is not None and trainer.is_global_zero:
            log.warning("There will be no LPIPS: %s.", problem)
        if problem is not None or not is_leader(trainer):
            self._network = None
        else:
            self._network = (self._network or load_lpips(self.lpips)).to(trainer.strategy.root_device)

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
        if self.folder is None or not is_leader(trainer):
            return
        writer = tensorboard(trainer)
        for prediction in outputs:
            files = frames_of(self.folder, prediction.steps, prediction.sample.id)
            if not files:
                self._missing.append((prediction.steps, prediction.sample.id))
                continue
            self._compared += 1
            found = self._compare(trainer, prediction, files)
            prediction.metrics |= found
            number = self._count.next(trainer, prediction.steps)
            for name, value in found.items() if writer is not None else ():
                writer.add_scalar(f"reference/{name}/steps={prediction.steps}", value, number)

    def _compare(self, trainer: Trainer, prediction: Prediction, files: list[Path]) -> dict[str, float]:
        device = trainer.strategy.root_device
        try:
            return compare_frames(prediction.frames, read_frames(files), self.ssim, self._network, device)
        except ValueError as error:
            raise ValueError(
                f"Sample {prediction.sample.id} does not compare with reference_metrics.folder {self.folder}: {error}"
            ) from error

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None:
            return
        found = gather(trainer, (self._compared, self._missing))
        if found is None:
            return
        missing = sorted({key for _, keys in found for key in keys})
        if missing:
            total = sum(number for number, _ in found) + len(missing)
            steps, name = missing[0]
            log.warning(
                "%d of %d samples have no frames in the reference %s (%s of %d steps for one) and were not compared.",
                *(len(missing), total, self.folder, name, steps),
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._network = None
