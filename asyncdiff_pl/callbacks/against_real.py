"""What measures of generated pictures against real ones have in common: all ranks' pictures, and earlier runs'."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.callbacks.real_pictures import CHUNK, RealPictures, read_statistics, statistics_file, write_statistics
from asyncdiff_pl.callbacks.roles import data_rank, data_size, gather, is_leader, log_folder, tensorboard
from asyncdiff_pl.callbacks.written_frames import frames_of, read_archived, read_frames
from asyncdiff_pl.metrics.frechet import FrechetDistance
from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.metrics.precision_recall import PrecisionRecall
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.models.features import check_features

log = logging.getLogger(__name__)

Measure = FrechetDistance | PrecisionRecall


class AgainstReal(Callback):
    """Measures what was generated against real pictures, for each step count; a subclass says what is measured.

    All frames of a sample count. What is needed of the real pictures is kept in the cache folder. A run that goes on
    takes the frames that it wrote before as well; if some were written neither as PNG nor in an archive, nothing is
    measured.

    Args:
        real: Where the real pictures are; None measures nothing.
        features: The network; see `models.features.load_network`.
        max_real: Takes so many real pictures; None takes all.
    """

    title: ClassVar[str]
    """What is measured, in words."""

    def __init__(self, real: str | None, features: str, max_real: int | None) -> None:
        if max_real is not None and max_real < 2:
            raise ValueError(f"max_real is {max_real}; give a number of pictures from 2 up, or null for all.")
        self.real = None if real is None else RealPictures(Path(real).expanduser(), max_real)
        self.features = features
        self.described: dict[str, str] = {} if self.real is None else {"real_pictures": str(self.real.path.resolve())}
        """What a row of results.csv says of the real pictures; runs of one log folder share it."""
        self.step_metrics: dict[int, dict[str, float]] = {}
        """On rank 0 at the end: the columns of each step count."""
        self._network: nn.Module | None = None
        self._folder: Path | None = None
        self._sums: dict[int, Measure] = {}
        self._size: tuple[int, int] | None = None

    # -- what a subclass says -----------------------------------------------------------------------------------

    def load(self) -> nn.Module:
        """Loads the network, and tells that the measure cannot be had; on the CPU.

        Raises:
            MissingNetwork: It cannot be had.
        """
        raise NotImplementedError

    def new_measure(self, network: nn.Module) -> Measure:
        """The measure, of no pictures yet."""
        raise NotImplementedError

    def columns(self, total: Measure, steps: int) -> dict[str, float]:
        """The columns of a step count; none, with a warning, where there are too few pictures."""
        raise NotImplementedError

    # -- hooks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Tells early that there are no real pictures or no such network.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        if self.real is not None:
            self.real.check()
            check_features(self.features)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" or self.real is None:
            return
        self.check()
        self._folder = log_folder(trainer)
        problem = None
        try:
            # the first rank of each node goes first, so that a download happens once a node
            if trainer.local_rank == 0:
                self._network = self.load().to(trainer.strategy.root_device)
        except MissingNetwork as error:
            problem = str(error)
        # the same on all ranks: a measure of a part of the pictures would be another one
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            self._network = None
            if trainer.is_global_zero:
                log.warning("There will be no %s: %s.", self.title, problem)
        elif not is_leader(trainer):
            self._network = None
        elif self._network is None:
            self._network = self.load().to(trainer.strategy.root_device)

    def _new(self, trainer: Trainer) -> Measure:
        assert self._network is not None
        return self.new_measure(self._network).to(trainer.strategy.root_device)

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
        if self._network is None:
            return
        for prediction in outputs:
            if prediction.steps not in self._sums:
                self._sums[prediction.steps] = self._new(trainer)
            self._sums[prediction.steps].add(prediction.frames, is_real=False)
            self._size = self._size or prediction.frames[0].size

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.real is None:
            return
        made = {steps: measure.sums() for steps, measure in self._sums.items()}
        parts = gather(trainer, (made, self._size))
        size = None if parts is None else next((size for _, size in parts if size is not None), None)
        size = trainer.strategy.broadcast(size)
        if size is None:
            return  # nothing was generated, or there is no network
        real = self._real_sums(trainer, size)
        if parts is None or real is None:
            return
        for steps in sorted({steps for made, _ in parts for steps in made}):
            total = self._new(trainer)
            for sums in (*(made[steps] for made, _ in parts if steps in made), real):
                total.merge(sums)
            if not self._add_earlier(trainer, total, steps):
                continue
            columns = self.columns(total, steps)
            if columns:
                self.step_metrics[steps] = columns
            writer = tensorboard(trainer)
            for name, value in columns.items() if writer is not None else ():
                writer.add_scalar(f"results/{name}", value, steps)

    def _real_sums(self, trainer: Trainer, size: tuple[int, int]) -> dict[str, Tensor] | None:
        """What the real pictures add up to, on rank 0: kept from an earlier run, or each data group's share."""
        assert self.real is not None
        file = found = None
        if trainer.is_global_zero:
            assert self._network is not None
            file = statistics_file(type(self).__name__, self.real, size, self._network)
            found = read_statistics(file)
        if trainer.strategy.broadcast(found is not None):
            return found
        own = None
        if self._network is not None:
            share = self._new(trainer)
            for pictures in self.real.read(size, data_rank(trainer), data_size(trainer)):
                share.add(pictures, is_real=True)
            own = share.sums()
        parts = gather(trainer, own)
        if parts is None or file is None:
            return None
        total = self._new(trainer)
        for sums in parts:
            if sums is not None:
                total.merge(sums)
        found = total.sums()
        write_statistics(file, found)
        return found

    def _add_earlier(self, trainer: Trainer, total: Measure, steps: int) -> bool:
        """Adds the samples that earlier runs into this folder made; False if their frames are not all there."""
        assert self._folder is not None
        done = {name for callback in trainer.callbacks for n, name in getattr(callback, "done", ()) if n == steps}
        archived = read_archived(self._folder, steps) if done else {}
        left = []
        for name in sorted(done):
            if name in archived:
                left.append(archived[name])
                continue
            files = frames_of(self._folder, steps, name)
            if not files:
                log.warning(
                    "There is no %s for %d steps: of the %d samples that were made before, those from %s on have no "
                    "frames as PNG in %s.",
                    *(self.title, steps, len(done), name, self._folder),
                )
                return False
            total.add(read_frames(files), is_real=False)
        for start in range(0, len(left), CHUNK):
            total.add(left[start : start + CHUNK], is_real=False)
        return True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._network, self._sums = None, {}
