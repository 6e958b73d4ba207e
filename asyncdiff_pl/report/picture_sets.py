"""What can be compared: the frames of a run's log folder, or a plain folder of pictures; and which belong together."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.callbacks.sample_table import Row, key_of, read_table
from asyncdiff_pl.callbacks.written_frames import Files, order_of, samples_of, step_counts
from asyncdiff_pl.data.coco import DEMO_FOLDER, read_captions
from asyncdiff_pl.data.image_sets import read_archive
from asyncdiff_pl.data.pictures import SUFFIXES, fit_image, read_picture
from asyncdiff_pl.data.sample import UnreadableSample

Key = tuple[int | None, str]
"""Step count (None in a plain folder) and id of a sample."""

Pairs = dict[tuple[int | None, int | None], list[tuple[Key, Key]]]
"""Keys of samples that belong together, by their step counts."""


@dataclass
class PictureSet:
    """The pictures of one folder.

    Args:
        label: What it is called.
        folder: Where it is.
        files: The files of each sample, by its key.
        is_run: Whether it is the log folder of a run; the pictures of a plain folder may be brought to another size.
        rows: Rows of samples.csv, by key.
        results: Rows of results.csv, by step count.
        captions: What the samples show, by id, as far as it is known.
        size: Width and height that pictures are brought to, in pixels; None leaves them as they are.
    """

    label: str
    folder: Path
    files: dict[Key, Files]
    is_run: bool
    rows: dict[Key, Row] = field(default_factory=dict)
    results: dict[int, Row] = field(default_factory=dict)
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    @property
    def steps(self) -> list[int | None]:
        """Step counts, in order; [None] for a plain folder."""
        return list(dict.fromkeys(steps for steps, _ in self.files))

    def sizes(self) -> set[tuple[int, int]]:
        """Sizes of the pictures as they are: of the first frame of each sample.

        Raises:
            ValueError: A file is no picture.
        """
        found = set()
        for path, *_ in self.files.values():
            try:
                with Image.open(path) as picture:
                    found.add(picture.size)
            except OSError as error:
                raise ValueError(f"{path} cannot be read; remove it from {self.folder}.") from error
        return found

    def frames(self, key: Key) -> list[Image.Image]:
        """The pictures of one sample, in RGB and in the size that they are to have.

        Raises:
            ValueError: A file cannot be read.
        """
        try:
            return [read_picture(path, *(self.size or (None, None))) for path in self.files[key]]
        except UnreadableSample as error:
            raise ValueError(f"{error}; remove it from {self.folder}.") from error


@dataclass
class ArchiveSet(PictureSet):
    """The pictures of one .npz file.

    Args:
        images: [N, 3, H, W], uint8, in the order of `files`, which name no files.
    """

    images: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self._places = {key: place for place, key in enumerate(self.files)}

    @override
    def sizes(self) -> set[tuple[int, int]]:
        return {(self.images.shape[3], self.images.shape[2])}

    @override
    def frames(self, key: Key) -> list[Image.Image]:
        picture = Image.fromarray(self.images[self._places[key]].permute(1, 2, 0).numpy())
        return [picture if self.size in (None, picture.size) else fit_image(picture, *self.size, "crop")]


def read_archive_set(path: Path, label: str | None = None) -> ArchiveSet:
    """Reads the pictures of an .npz file, as the callback `PictureArchive` writes it or as sets are published.

    Args:
        path: It holds what `data.image_sets.read_archive` takes, and `id` [N]; without that the pictures are named by
            the file and their number, and belong together with none of another set.
        label: What it is called; None takes the last names of the path.

    Raises:
        ValueError: It holds no pictures.
    """
    images = read_archive(path).images
    with np.load(path) as arrays:
        ids = arrays["id"].tolist() if "id" in arrays else [f"{path.stem}:{place}" for place in range(len(images))]
    files: dict[Key, Files] = {(None, str(name)): [] for name in ids}
    return ArchiveSet(label or "/".join(path.resolve().parts[-2:]), path, files, is_run=False, images=images)


def read_set(folder: str, label: str | None = None, annotations: str | None = None) -> PictureSet:
    """Reads a log folder, a plain folder or an .npz file; files of pictures are read only when they are asked for.

    In a plain folder each picture is a sample, named by its file without the suffix, and so is each folder of pictures,
    a video. With annotations the pictures have the ids that these give them, and those that they do not name are left
    out.

    Args:
        folder: Path of a folder or an .npz file; `demo` means the drawn scenes that come with the package.
        label: What it is called; None takes the names of the last folders of the path.
        annotations: Captions file in COCO's format; `demo` means those of the drawn scenes.

    Raises:
        ValueError: There is no such folder, or it holds no pictures.
    """
    is_demo = folder == "demo"
    path = DEMO_FOLDER / "images" if is_demo else Path(folder).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return read_archive_set(path, label)
    if not path.is_dir():
        raise ValueError(f"There is no folder {folder} to compare; give a run's log folder or a folder of pictures.")
    named = _coco(DEMO_FOLDER / "captions.json" if annotations == "demo" else annotations)
    if is_demo and named is None:
        named = _coco(DEMO_FOLDER / "captions.json")
    captions = {} if named is None else {name: texts for name, texts in named.values()}
    label = label or ("demo" if is_demo else "/".join(path.resolve().parts[-2:]))
    steps = step_counts(path)
    if not steps:
        if (path / "samples.csv").exists():
            raise ValueError(f"The run in {folder} holds no frames; write them with frame_writer.png true.")
        files = _plain(path)
        if named is not None:
            files = {named[name][0]: found for name, found in files.items() if name in named}
        if not files:
            raise ValueError(f"{folder} holds no pictures{' of --annotations' if named else ''}; give another folder.")
        return PictureSet(
            label, path, {(None, name): files[name] for name in sorted(files, key=order_of)}, False, captions=captions
        )
    return PictureSet(
        label,
        path,
        {(n, name): files for n in steps for name, files in samples_of(path, n).items()},
        is_run=True,
        rows={key_of(row): row for row in read_table(path / "samples.csv")},
        results={int(row["steps"]): row for row in read_table(path / "results.csv")},
        captions=captions or captions_of_run(path),
    )


def pair(first: PictureSet, second: PictureSet) -> Pairs:
    """Which samples of two sets belong together: those of one id and, in runs, of one step count.

    Runs that have no step count in common pair all the same where one of them has a single step count. Numbers in the
    names of a plain folder's pictures count without the zeros before them.

    Returns:
        The pairs by step counts, in the order of the first set; empty where no ids are in common.

    Raises:
        ValueError: Two runs of several step counts have none of them in common.
    """
    common = [n for n in first.steps if n in second.steps]
    places = [(n, n) for n in common] or list(itertools.product(first.steps, second.steps))
    if not common and len(first.steps) > 1 and len(second.steps) > 1:
        texts = [", ".join(map(str, part.steps)) for part in (first, second)]
        raise ValueError(f"The runs have no step count in common ({texts[0]}, and {texts[1]}); give others.")
    found: Pairs = {}
    for n, m in places:
        others = {_plain_id(name): (steps, name) for steps, name in second.files if steps == m}
        matches = ((key, others.get(_plain_id(key[1]))) for key in first.files if key[0] == n)
        pairs = [(key, other) for key, other in matches if other is not None]
        if pairs:
            found[n, m] = pairs
    return found


def bring_to_one_size(first: PictureSet, second: PictureSet) -> str | None:
    """Sets the size that a plain folder's pictures are brought to, where the two sets differ.

    A run's pictures stay as they are. Of two plain folders the one whose pictures have one size keeps it, the first if
    both have.

    Returns:
        What is done, in words; None if nothing is.

    Raises:
        ValueError: Two runs, or two plain folders of several sizes each, which do not compare.
    """
    sizes = [first.sizes(), second.sizes()]
    if sizes[0] == sizes[1] and len(sizes[0]) == 1:
        return None
    texts = [", ".join(f"{w}x{h}" for w, h in sorted(part)[:3]) + (", ..." if len(part) > 3 else "") for part in sizes]
    if first.is_run and second.is_run:
        if sizes[0] == sizes[1]:
            return None  # each sample has a size of its own
        raise ValueError(
            f"The frames of {first.label} are {texts[0]} and those of {second.label} {texts[1]} pixels; compare runs "
            "of one size."
        )
    keeps = [k for k, part in enumerate((first, second)) if part.is_run] or [k for k in (0, 1) if len(sizes[k]) == 1]
    if not keeps or len(sizes[keeps[0]]) > 1:
        raise ValueError(
            f"The pictures of {first.label} are {texts[0]} and those of {second.label} {texts[1]} pixels; bring one "
            "of the folders to one size first."
        )
    kept, changed = ((first, second), (second, first))[keeps[0]]
    changed.size = next(iter(sizes[keeps[0]]))
    width, height = changed.size
    return f"{changed.label}: pictures are brought to {width}x{height} pixels, as {kept.label} has them (cropped)"


def captions_of_run(folder: Path) -> dict[str, tuple[str, ...]]:
    """The captions that a run's samples were scored against, by id; none where its config does not lead to them."""
    try:
        data = yaml.safe_load((folder / "config.yaml").read_bytes())["data"]
        module, _, name = data["class_path"].rpartition(".")
        kind = getattr(importlib.import_module(module or "asyncdiff_pl.data"), name)
        return {entry.id: tuple(entry.captions) for entry in kind(**data.get("init_args", {})).entries}
    # no config, a data module without captions, or one whose files are elsewhere by now
    except (OSError, yaml.YAMLError, LookupError, AttributeError, TypeError, ImportError, ValueError):
        return {}


def _plain(folder: Path) -> dict[str, Files]:
    """Samples of a plain folder: pictures by their names, and folders of pictures."""
    files: dict[str, Files] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            files.setdefault(path.stem, [path])
    for path in folder.iterdir():
        frames = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
        if frames:
            # beside it may be its animation
            files[path.name] = frames
    return files


def _coco(annotations: Path | str | None) -> dict[str, tuple[str, tuple[str, ...]]] | None:
    """Id and captions of each picture of an annotation file, by the file's name without its suffix."""
    if annotations is None:
        return None
    coco = read_captions(Path(annotations).expanduser())
    return {
        Path(image["file_name"]).stem: (
            str(image["id"]),
            tuple(note["caption"] for note in coco.imgToAnns.get(image["id"], ()) if note["caption"].strip()),
        )
        for image in coco.imgs.values()
    }


def _plain_id(name: str) -> str:
    return str(int(name)) if name.isdecimal() else name
