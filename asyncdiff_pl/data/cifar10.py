"""The data module of small pictures for training: the whole set on the device, where batches are picked and flipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from asyncdiff_pl.data.image_sets import ImageSet, Part, download, find_source, kept_archive
from asyncdiff_pl.data.pictures import SUFFIXES

DEVICE_SHARE = 0.25
"""Share of a device's free memory that pictures may take."""


@dataclass
class PickedPictures(IterableDataset):
    """Which pictures are in each batch of a rank, and which of them are flipped, without end.

    Each epoch goes through all pictures in an order of its own, as far as they fill batches for all ranks. Batch n is
    the same in every run: a run that goes on in the midst of an epoch goes on with the pictures that come next.

    Args:
        number: Number of pictures.
        batch_size: Pictures of a batch, on each rank.
        rank: Which of the ranks this one is; ranks take other pictures.
        ranks: How many ranks there are.
        seed: Seed of the order.
        flip: Whether each picture is flipped half of the time.
        first: Number of the first batch of this rank.
    """

    number: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    seed: int = 0
    flip: bool = True
    first: int = 0

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        per_epoch = self.number // (self.batch_size * self.ranks)
        order, current = torch.empty(0), -1
        place = self.first
        while True:
            epoch, within = divmod(place, per_epoch)
            if epoch != current:
                order, current = torch.randperm(self.number, generator=self._generator(epoch, -1)), epoch
            start = (within * self.ranks + self.rank) * self.batch_size
            index = order[start : start + self.batch_size]
            flipped = torch.zeros(self.batch_size, dtype=torch.bool)
            if self.flip:
                flipped = torch.rand(self.batch_size, generator=self._generator(epoch, start)) < 0.5
            yield {"number": place, "part": "train", "index": index, "flipped": flipped}
            place += 1

    def _generator(self, *place: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, *place)))


class Cifar10(LightningDataModule):
    """Serves CIFAR-10, or any set of small pictures that fits into memory, to train on.

    The pictures lie on the training device as bytes, where there is room for them: a batch is picked, flipped and made
    numbers there. A run that goes on continues with the pictures that come next, and ranks share each epoch out.

    Args:
        path: A folder with CIFAR-10's published batches for Python; one with `train.npz` and `test.npz`, or one .npz
            file (`images` [N, H, W, 3] of uint8, or `jpeg` and `offset`); or a folder of pictures, in `train` and
            `test` if some are for validation alone.
        download: Fetch the published batches (170 MB) into `path` if they are not there.
        batch_size: Pictures of a batch, on each rank.
        size: Height and width that a folder's pictures are brought to, in pixels; other sources have their own.
        flip: Whether each training picture is mirrored, left to right, half of the time.
        max_images: Train on the first so many pictures only; null for all.
        validation_images: Validate with the first so many test pictures, shared out over the ranks; null for all.
        seed: Seed of the order of the pictures.
    """

    def __init__(
        self,
        path: str = "data/cifar10",
        download: bool = False,
        batch_size: int = 128,
        size: int = 32,
        flip: bool = True,
        max_images: int | None = None,
        validation_images: int | None = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"batch_size": batch_size, "size": size, "max_images": max_images}
        for name, value in (least | {"validation_images": validation_images}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; give a number from 1 up.")
        self.path = Path(path).expanduser()
        self.download = download
        self.batch_size = batch_size
        self.size = size
        self.flip = flip
        self.max_images = max_images
        self.validation_images = validation_images
        self.seed = seed
        self._sets: dict[Part, ImageSet] = {}

    def check(self) -> None:
        """Tells that there are no pictures, before anything runs.

        Raises:
            ValueError: In one sentence.
        """
        if not self.download and find_source(self.path, "train") is None:
            raise ValueError(
                f"{self.path} holds neither CIFAR-10's batches nor .npz files nor pictures; give another data.path, or "
                "fetch them with `--data.download true`."
            )

    def real_pictures(self, number: int | None = None) -> Path:
        """Where the training pictures are, as callbacks take real pictures.

        Args:
            number: They may be many; all are there.

        Returns:
            The set itself; of picture files an .npz file in the cache folder, since classes may have folders.
        """
        files = [] if self.path.is_file() else sorted(self.path.rglob("*"))
        read = find_source(self.path, "train")
        if read is None or not any(file.suffix.lower() in SUFFIXES for file in files):
            return self.path
        known = repr((self.size, [(str(file.resolve()), file.stat().st_mtime_ns) for file in files]))
        return kept_archive("pictures", known.encode(), lambda: read(self.size).images)

    @override
    def prepare_data(self) -> None:
        """Fetches the published batches on one rank of each node, while the others wait."""
        if self.download and find_source(self.path, "train") is None:
            download(self.path)

    @override
    def setup(self, stage: str) -> None:
        """Reads the pictures."""
        if self._sets:
            return
        self.check()
        read = find_source(self.path, "train")
        assert read is not None
        train = read(self.size)
        self._sets["train"] = ImageSet(train.images[: self.max_images], train.labels[: self.max_images])
        read = find_source(self.path, "test")
        if read is None:
            rank_zero_warn(f"{self.path} has no test pictures: the validation loss is that of training pictures.")
        self._sets["test"] = self._sets["train"] if read is None else read(self.size)
        number, needed = self.num_images, self.batch_size * self._world[1]
        if number < needed:
            raise ValueError(
                f"There are {number} training pictures, and a batch of {self.batch_size} on each of {self._world[1]} "
                f"ranks takes {needed}; set data.batch_size to {max(1, number // self._world[1])} at most."
            )

    @property
    def num_images(self) -> int:
        """Number of training pictures, known from `setup` on."""
        return len(self._sets["train"].images)

    @property
    def _world(self) -> tuple[int, int]:
        """This rank's number, and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @override
    def train_dataloader(self) -> DataLoader:
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0
        picked = PickedPictures(self.num_images, self.batch_size, *self._world, self.seed, self.flip, done)
        # indices in page-locked memory: no step waits for their copy
        return DataLoader(picked, batch_size=None, pin_memory=torch.cuda.is_available())

    @override
    def val_dataloader(self) -> DataLoader:
        rank, ranks = self._world
        number = len(self._sets["test"].images[: self.validation_images])
        # every rank has as many, for its collectives go in step: what is too much at the end is not counted
        places = torch.arange(rank, -(-number // ranks) * ranks, ranks)
        entries = [
            {
                "number": place,
                "part": "test",
                "index": index.clamp(max=number - 1),
                "flipped": index < 0,
                "counted": int((index < number).sum()),
            }
            for place, index in enumerate(places.split(self.batch_size))
        ]
        return DataLoader(entries, batch_size=None)  # type: ignore[arg-type]

    # -- on the device ------------------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Picks the pictures: `frames` [B, 1, 3, H, W] from 0 to 1, and `label` [B]."""
        part, index, device = batch["part"], batch["index"], batch["index"].device
        images, labels = self._sets[part] = _brought(self._sets[part], device)
        index = index.to(images.device)
        picked = images[index].to(device)
        picked = torch.where(batch["flipped"].view(-1, 1, 1, 1), picked.flip(-1), picked)
        return {**batch, "frames": picked[:, None].float() / 255, "label": labels[index].to(device)}


def _brought(found: ImageSet, device: torch.device) -> ImageSet:
    """Pictures on a device, if there is room for them."""
    if found.images.device == device or device.type != "cuda":
        return found
    if found.images.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return found
    return ImageSet(found.images.to(device), found.labels.to(device))
