"""Sets of small pictures that are held in memory whole: CIFAR-10's published batches, .npz files, folders of pictures.

Python batches: Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images", as published at
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asyncdiff_pl.cache import cache_folder
from asyncdiff_pl.data.pictures import SUFFIXES, read_picture
from asyncdiff_pl.data.sample import UnreadableSample

Part = Literal["train", "test"]
"""Pictures that are trained on, or others of the same kind."""

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"

BATCHES_FOLDER = "cifar-10-batches-py"
"""Name of the folder in the published archive."""

BATCHES: dict[Part, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}


class ImageSet(NamedTuple):
    """Pictures in memory.

    Args:
        images: [N, 3, H, W], uint8.
        labels: [N], int64; -1 where there are no classes.
    """

    images: Tensor
    labels: Tensor


def find_source(path: Path, part: Part) -> Callable[[int], ImageSet] | None:
    """Says how a part is read, by what lies at a path, without reading pictures.

    Args:
        path: A folder with the published batches (or with their folder), with `train.npz` and `test.npz`, or with
            pictures (in `train` and `test`, if there are both parts); or one .npz file of training pictures.
        part: Which part.

    Returns:
        Reads it; what it is given is the height and width that a folder's pictures are brought to. None if there is no
        such part.
    """
    for folder in (path, path / BATCHES_FOLDER):
        files = [folder / name for name in BATCHES[part]]
        if all(file.is_file() for file in files):
            return lambda size: read_batches(files)
    if path.is_file():
        return (lambda size: read_archive(path)) if part == "train" else None
    archive = path / f"{part}.npz"
    if archive.is_file():
        return lambda size: read_archive(archive)
    for folder in (path / part, path):
        # what lies in no part's folder is trained on
        pictures = _picture_files(folder) if folder != path or part == "train" else []
        if pictures:
            return lambda size: read_pictures(pictures, size)
    return None


def read_batches(files: Sequence[Path]) -> ImageSet:
    """Reads published batches: pickled dictionaries of rows of 3072 bytes, colour by colour.

    Args:
        files: The batches, in order.

    Raises:
        ValueError: A file is not such a batch.
    """
    images, labels = [], []
    for file in files:
        try:
            with file.open("rb") as stream:
                batch = _PlainUnpickler(stream, encoding="latin1").load()
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch["labels"], dtype=np.int64))
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no batch of CIFAR-10 ({error}); fetch the published archive anew.") from error
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists and arrays alone: a pickle may run anything else."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.ALLOWED and module.partition(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_archive(file: Path) -> ImageSet:
    """Reads an .npz file.

    Args:
        file: It holds `images` (or, as one array alone, `arr_0`), [N, H, W, 3] or [N, 3, H, W] of uint8; or `jpeg`, all
            pictures' JPEG files one after the other, and `offset`, [N + 1], where each begins. `label` [N] is optional.

    Raises:
        ValueError: It holds something else.
    """
    try:
        with np.load(file) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no readable .npz file ({error}); give another.") from error
    if {"jpeg", "offset"} <= found.keys():
        images = _decode(found["jpeg"], found["offset"])
    else:
        images = found.get("images", found.get("arr_0", np.empty(0)))
        if images.ndim == 4 and images.shape[-1] == 3:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{file} holds {', '.join(f'{name} {tuple(value.shape)}' for name, value in found.items())}; it needs "
            "`images` [N, H, W, 3] of uint8, or `jpeg` and `offset`."
        )
    labels = found.get("label", np.full(len(images), -1)).astype(np.int64)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))


def _decode(content: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pictures [N, 3, H, W] of JPEG files; Pillow decodes without holding other threads up."""

    def decode(place: int) -> np.ndarray:
        encoded = content[offsets[place] : offsets[place + 1]].tobytes()
        with Image.open(io.BytesIO(encoded)) as picture:
            return np.asarray(picture.convert("RGB"))

    with ThreadPoolExecutor() as threads:
        found = np.stack(list(threads.map(decode, range(len(offsets) - 1), chunksize=256)))
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2))


def read_pictures(files: Sequence[Path], size: int) -> ImageSet:
    """Reads picture files; those in folders of their own have the folders' order as labels.

    Args:
        files: The files.
        size: Height and width that they are brought to, in pixels: scaled and cut to a square.

    Raises:
        ValueError: A file cannot be read.
    """

    def read(file: Path) -> np.ndarray:
        return np.asarray(read_picture(file, size, size))

    try:
        with ThreadPoolExecutor() as threads:
            found = np.stack(list(threads.map(read, files)))
    except UnreadableSample as error:
        raise ValueError(f"{error}; mend it or take it out of the folder.") from error
    classes = sorted({file.parent for file in files})
    numbers = [classes.index(file.parent) if len(classes) > 1 else -1 for file in files]
    return ImageSet(torch.from_numpy(np.ascontiguousarray(found.transpose(0, 3, 1, 2))), torch.tensor(numbers))


def _picture_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def kept_archive(folder: str, known: bytes, make: Callable[[], Tensor]) -> Path:
    """An .npz file of pictures in the cache folder, made if it is not there; any number of ranks may ask at once.

    Args:
        folder: Folder within the cache folder.
        known: What the pictures follow from.
        make: Makes them: [N, 3, H, W], uint8.
    """
    path = cache_folder() / folder / f"{hashlib.sha256(known).hexdigest()[:16]}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # under its name only when it is complete
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(temporary, images=make().permute(0, 2, 3, 1).numpy())
        temporary.replace(path)
    return path


def download(folder: Path) -> None:
    """Fetches the published batches and unpacks them.

    Args:
        folder: Is made if it is not there; the batches' own folder comes into it.

    Raises:
        ValueError: The archive cannot be fetched, or is not the published one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE_URL.rpartition("/")[2]
    partial = archive.with_name(f"{archive.name}.part")
    try:
        with urllib.request.urlopen(ARCHIVE_URL, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file, 2**20)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"{ARCHIVE_URL} cannot be fetched ({error}); fetch and unpack it yourself, and give its folder."
        ) from error
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != ARCHIVE_MD5:
        partial.unlink()
        raise ValueError(f"What came from {ARCHIVE_URL} has the MD5 sum {found}, not {ARCHIVE_MD5}; try again.")
    batches = folder / BATCHES_FOLDER
    batches.mkdir(exist_ok=True)
    names = {name for part in BATCHES.values() for name in part}
    with tarfile.open(partial) as content:
        for member in content:
            # the batches alone, by their own names: nothing may be written elsewhere
            name, file_inside = Path(member.name).name, content.extractfile(member)
            if file_inside is not None and name in names:
                # under its name only when it is complete
                temporary = batches / f".{name}"
                temporary.write_bytes(file_inside.read())
                temporary.replace(batches / name)
    partial.unlink()
