"""Where the frames that a run wrote are, by step count and id: what its callbacks write, found again."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

Files = list[Path]
"""The pictures of one sample, in order."""


def step_counts(folder: Path) -> list[int]:
    """The step counts that a log folder holds frames of, in order; none where it holds no frames."""
    names = (path.name.removeprefix("steps=") for path in (folder / "frames").glob("steps=*"))
    return sorted(int(name) for name in names if name.isdecimal())


def frames_of(folder: Path, steps: int, sample_id: str) -> Files:
    """The frames of one sample; none where there are none.

    Args:
        folder: Log folder of the run.
        steps: Step count.
        sample_id: Id of the sample.
    """
    place = folder / "frames" / f"steps={steps}" / quote(sample_id, safe=" ")
    picture = place.with_name(f"{place.name}.png")
    return [picture] if picture.is_file() else sorted(place.glob("*.png"))


def samples_of(folder: Path, steps: int) -> dict[str, Files]:
    """The frames of all samples of a step count, by id: in order of the ids, as numbers where they are numbers."""
    place = folder / "frames" / f"steps={steps}"
    names = {path.name for path in place.iterdir() if path.is_dir()} | {path.stem for path in place.glob("*.png")}
    found = {unquote(name): frames_of(folder, steps, unquote(name)) for name in names}
    return {name: found[name] for name in sorted(found, key=order_of) if found[name]}


def order_of(sample_id: str) -> tuple[bool, int, str]:
    """By what samples are put in order: numbers by their value, then other names."""
    is_number = sample_id.isdecimal()
    return not is_number, int(sample_id) if is_number else 0, sample_id


def read_frames(files: Files) -> list[Image.Image]:
    """The pictures of some files, in RGB."""
    frames = []
    for path in files:
        with Image.open(path) as picture:
            frames.append(picture.convert("RGB"))
    return frames


def read_archived(folder: Path, steps: int) -> dict[str, Image.Image]:
    """The pictures that `PictureArchive` wrote, by id: those put together, and those of a run that was stopped.

    Args:
        folder: Log folder of the run.
        steps: Step count.
    """
    found = {}
    for file in sorted((folder / "pictures").glob(f"steps={steps}.*npz")):
        with np.load(file) as arrays:
            images, ids = arrays["images"], arrays["id"]
        found |= {str(name): Image.fromarray(pixels) for name, pixels in zip(ids, images, strict=True)}
    return found
