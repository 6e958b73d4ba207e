"""How far what was generated is from real pictures: a Fréchet distance for each step count, FID for one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import data_rank, data_size, gather, is_leader, log_folder, tensorboard
from asyncdiff_pl.callbacks.written_frames import frames_of, read_frames
from asyncdiff_pl.data.pictures import SUFFIXES, read_picture
from asyncdiff_pl.data.sample import UnreadableSample
from asyncdiff_pl.metrics import frechet
from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.models.features import check_features, load_features

log = logging.getLogger(__name__)

CHUNK = 64
"""Real pictures that are in memory at once."""


class FrechetDistance(Callback):
    """Measures the Fréchet distance between what was generated and real pictures, for each step count.

    All frames of a sample count. The distance is a column of results.csv: `fid` with FID's Inception network, else
    `frechet_distance (<network>)`; TensorBoard shows it as `results/<column>`. Distances compare only between runs of
    equally many pictures, and with fewer pictures than the network has features they come out too large. A run that
    goes on takes the frames that it wrote before as well; if some were not written as PNG, it has no distance.

    Args:
        real: Folder of real pictures, which are brought to the size of the generated ones (cropped); null measures
            nothing.
        features: The network: a CLIP model (`tiny-clip`, a hub name, a folder), `inception` for FID (needs
            torch-fidelity, which fetches it), a `.pth` file of its weights, a TorchScript file such as
            `inception-2015-12-05.pt` (FID as well), or a class `my_module.MyFeatures`.
        max_real: Takes the first so many real pictures, by name; null takes all.
    """

    def __init__(self, real: str | None = None, features: str = "inception", max_real: int | None = None) -> None:
        if max_real is not None and max_real < 2:
            raise ValueError(f"max_real is {max_real}; give a number of pictures from 2 up, or null for all.")
        self.real = None if real is None else Path(real).expanduser()
        self.features = features
        self.max_real = max_real
        self.described: dict[str, str] = {} if self.real is None else {"real_pictures": str(self.real.resolve())}
        """What a row of results.csv says of the real pictures; runs of one log folder share it."""
        self.step_metrics: dict[int, dict[str, float]] = {}
        """On rank 0 at the end: the distance of each step count."""
        self._column = ""
        self._network: nn.Module | None = None
        self._folder: Path | None = None
        self._sums: dict[int, frechet.FrechetDistance] = {}
        self._size: tuple[int, int] | None = None

    def check(self) -> None:
        """Tells early that there are no real pictures or no such network.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        if self.real is None:
            return
        if not self.real.is_dir():
            raise ValueError(f"There is no folder {self.real} of real pictures; give one that exists.")
        if len(pictures_in(self.real)) < 2:
            raise ValueError(f"{self.real} holds fewer than 2 pictures; give a folder of real pictures.")
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
                self._load(trainer)
        except MissingNetwork as error:
            problem = str(error)
        # the same on all ranks: a distance of a part of the pictures would be another one
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            self._network = None
            if trainer.is_global_zero:
                log.warning("There will be no Fréchet distance: %s.", problem)
        elif not is_leader(trainer):
            self._network = None
        elif self._network is None:
            self._load(trainer)

    def _load(self, trainer: Trainer) -> None:
        self._column, self._network = load_features(self.features)
        self._network.to(trainer.strategy.root_device)
        # tells now, not after the run, that torchmetrics' metric cannot be had
        frechet.FrechetDistance(self._network)

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
            self._distance(trainer, prediction.steps).add(prediction.frames, is_real=False)
            self._size = self._size or prediction.frames[0].size

    def _distance(self, trainer: Trainer, steps: int) -> frechet.FrechetDistance:
        assert self._network is not None
        if steps not in self._sums:
            self._sums[steps] = frechet.FrechetDistance(self._network).to(trainer.strategy.root_device)
        return self._sums[steps]

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.real is None:
            return
        made = {steps: distance.sums() for steps, distance in self._sums.items()}
        parts = gather(trainer, (made, self._size))
        size = None if parts is None else next((size for _, size in parts if size is not None), None)
        size = trainer.strategy.broadcast(size)
        if size is None:
            return  # nothing was generated, or there is no network
        real = gather(trainer, self._real_sums(trainer, size))
        if parts is None or real is None:
            return
        assert self._network is not None
        for steps in sorted({steps for made, _ in parts for steps in made}):
            total = frechet.FrechetDistance(self._network).to(trainer.strategy.root_device)
            for sums in (*(made[steps] for made, _ in parts if steps in made), *real):
                if sums is not None:
                    total.merge(sums)
            if self._add_earlier(trainer, total, steps):
                self._finish(trainer, total, steps)

    def _real_sums(self, trainer: Trainer, size: tuple[int, int]) -> dict[str, Tensor] | None:
        """What this data group's share of the real pictures adds up to."""
        if self._network is None:
            return None
        assert self.real is not None
        distance = frechet.FrechetDistance(self._network).to(trainer.strategy.root_device)
        files = pictures_in(self.real)[: self.max_real][data_rank(trainer) :: data_size(trainer)]
        for start in range(0, len(files), CHUNK):
            distance.add(read_resized(files[start : start + CHUNK], size), is_real=True)
        return distance.sums()

    def _add_earlier(self, trainer: Trainer, total: frechet.FrechetDistance, steps: int) -> bool:
        """Adds the samples that earlier runs into this folder made; False if their frames are not all there."""
        assert self._folder is not None
        done = {name for callback in trainer.callbacks for n, name in getattr(callback, "done", ()) if n == steps}
        for count, name in enumerate(sorted(done)):
            files = frames_of(self._folder, steps, name)
            if not files:
                log.warning(
                    "There is no Fréchet distance for %d steps: of the %d samples that were made before, those from "
                    "%s on have no frames as PNG in %s.",
                    *(steps, len(done), sorted(done)[count], self._folder),
                )
                return False
            total.add(read_frames(files), is_real=False)
        return True

    def _finish(self, trainer: Trainer, total: frechet.FrechetDistance, steps: int) -> None:
        real, generated = total.counts
        if min(real, generated) < 2:
            log.warning("There is no Fréchet distance for %d steps: it needs 2 pictures of each kind.", steps)
            return
        if min(real, generated) <= total.num_features:
            log.warning(
                "%s for %d steps is of %d generated and %d real pictures, fewer than the network's %d features: it is "
                "too large, and compares only with distances of equally many pictures.",
                *(self._column, steps, generated, real, total.num_features),
            )
        self.step_metrics[steps] = {self._column: total.compute()}
        writer = tensorboard(trainer)
        if writer is not None:
            writer.add_scalar(f"results/{self._column}", self.step_metrics[steps][self._column], steps)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._network, self._sums = None, {}


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_resized(files: Sequence[Path], size: tuple[int, int]) -> list[Image.Image]:
    """Pictures brought to a size, cropped where their shape is another; those that cannot be read are left out.

    Args:
        files: The pictures.
        size: Width and height in pixels.
    """
    pictures = []
    for path in files:
        try:
            pictures.append(read_picture(path, *size))
        except UnreadableSample as error:
            log.warning("%s; it is left out.", error)
    return pictures
