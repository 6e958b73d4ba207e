"""The real pictures that generated ones are compared with, as files or in one, and what is kept of them."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from asyncdiff_pl.cache import cache_folder
from asyncdiff_pl.data.image_sets import BATCHES, BATCHES_FOLDER, ImageSet, read_archive, read_batches
from asyncdiff_pl.data.pictures import SUFFIXES, fit_image, read_picture
from asyncdiff_pl.data.sample import UnreadableSample

log = logging.getLogger(__name__)

CHUNK = 64
"""Pictures that are made ready at once."""


class RealPictures:
    """Real pictures, of which some may be taken, evenly spread over all: sets are often in order of their classes.

    Args:
        path: A folder of picture files; an .npz file, see `data.image_sets.read_archive`; or a folder with CIFAR-10's
            published batches or a `train.npz`.
        maximum: Take so many; None takes all.
    """

    def __init__(self, path: Path, maximum: int | None = None) -> None:
        self.path = path
        self.maximum = maximum

    def check(self) -> None:
        """Tells early that there are too few pictures.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        if self.path.is_file():
            if self.path.suffix != ".npz":
                raise ValueError(f"{self.path} is no .npz file; give one, or a folder of real pictures.")
        elif not self.path.is_dir():
            raise ValueError(f"There is no folder {self.path} of real pictures; give one that exists.")
        elif len(self._files()) < 2 and self._set() is None:
            raise ValueError(f"{self.path} holds fewer than 2 pictures; give a folder of real pictures.")

    def read(self, size: tuple[int, int], share: int = 0, shares: int = 1) -> Iterator[list[Image.Image]]:
        """Pictures brought to a size, cropped where their shape is another; those that cannot be read are left out.

        Args:
            size: Width and height in pixels.
            share: Which share of the pictures, from 0.
            shares: Number of shares.
        """
        read = self._set()
        files = [] if read else self._files()
        images = read().images if read else torch.empty(0)
        chosen = self._chosen(len(files) or len(images))[share::shares]
        for start in range(0, len(chosen), CHUNK):
            part = chosen[start : start + CHUNK]
            if read:
                pictures = [Image.fromarray(array) for array in images[part].permute(0, 2, 3, 1).numpy()]
                yield [one if one.size == size else fit_image(one, *size, "crop") for one in pictures]
            else:
                yield _read_files([files[place] for place in part], size)

    def fingerprint(self) -> str:
        """Tells whether the pictures are the same as at another time: names, sizes and times of their files."""
        files = [self.path] if self.path.is_file() else self._files() or sorted(self.path.rglob("*"))
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((self.maximum, stats)).encode()).hexdigest()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.suffix.lower() in SUFFIXES)

    def _set(self) -> Callable[[], ImageSet] | None:
        """Reads what is a set in one piece; None for picture files."""
        for archive in (self.path, self.path / "train.npz"):
            if archive.is_file():
                return lambda: read_archive(archive)
        for folder in (self.path, self.path / BATCHES_FOLDER):
            batches = [folder / name for name in BATCHES["train"]]
            if all(file.is_file() for file in batches):
                return lambda: read_batches(batches)
        return None

    def _chosen(self, number: int) -> list[int]:
        count = number if self.maximum is None else min(number, self.maximum)
        return [place * number // count for place in range(count)]


def _read_files(files: list[Path], size: tuple[int, int]) -> list[Image.Image]:
    pictures = []
    for path in files:
        try:
            pictures.append(read_picture(path, *size))
        except UnreadableSample as error:
            log.warning("%s; it is left out.", error)
    return pictures


def statistics_file(measure: str, real: RealPictures, size: tuple[int, int], network: nn.Module) -> Path:
    """Where what a measure needs of real pictures is kept in the cache folder; it may not be there yet.

    Args:
        measure: Name of the measure.
        real: The pictures.
        size: Width and height that they are brought to, in pixels.
        network: What makes features of them; its weights and its code count.
    """
    content = hashlib.sha256(repr((measure, real.fingerprint(), size, type(network).__qualname__)).encode())
    source = inspect.getsourcefile(type(network))
    if source is not None:
        content.update(Path(source).read_bytes())
    for name, value in network.state_dict().items():
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return cache_folder() / "statistics" / f"{content.hexdigest()[:32]}.pt"


def read_statistics(file: Path) -> dict[str, Tensor] | None:
    """What is kept in a file; None if there is none, or it cannot be read."""
    if not file.is_file():
        return None
    try:
        return torch.load(file, weights_only=True)
    # what is cut off makes torch raise many kinds
    except Exception as error:
        log.warning("%s cannot be read (%s); it is made again.", file, error)
        return None


def write_statistics(file: Path, sums: dict[str, Tensor]) -> None:
    """Keeps statistics; another process may do the same at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(sums, part)
    part.replace(file)
