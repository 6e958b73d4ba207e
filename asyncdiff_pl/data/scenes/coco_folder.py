"""Writes scenes as a folder in COCO's format: pictures of time 0 and their captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from asyncdiff_pl.data.scenes.captions import captions
from asyncdiff_pl.data.scenes.draw import draw
from asyncdiff_pl.data.scenes.numbers import Split
from asyncdiff_pl.data.scenes.sampling import sample_scenes

ImageFormat = Literal["png", "jpg"]
_BATCH = 32


def write_coco(
    folder: Path | str,
    split: Split,
    count: int,
    size: int = 128,
    start: int = 0,
    *,
    max_objects: int = 3,
    image_format: ImageFormat = "png",
) -> None:
    """Draws scenes into `folder/images` and writes `folder/captions.json`, five captions each.

    An image's id is the index of its scene, so a scene can be drawn again from what a result names.

    Args:
        folder: Where to write; it is made where it is missing.
        split: Which split the scenes are of.
        count: Number of scenes.
        size: Side of the pictures in pixels.
        start: Index of the first scene.
        max_objects: Largest number of objects of a scene.
        image_format: Format of the pictures: `png`, or `jpg` of quality 95.

    Raises:
        ValueError: A number is out of range.
    """
    if count < 1 or start < 0 or size < 8:
        raise ValueError(f"count is {count}, start {start}, size {size}; give at least 1, 0 and 8.")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, notes = [], []
    for first in range(start, start + count, _BATCH):
        index = torch.arange(first, min(first + _BATCH, start + count))
        scenes = sample_scenes(index, split, max_objects=max_objects)
        pictures = draw(scenes, torch.zeros(len(index), 1), size)[:, 0]
        pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for number, array, texts in zip(index.tolist(), pixels, captions(scenes), strict=True):
            name = f"{split}_{number:06d}.{image_format}"
            options = {"quality": 95} if image_format == "jpg" else {}
            Image.fromarray(array).save(folder / "images" / name, **options)
            images.append({"id": number, "file_name": name, "width": size, "height": size})
            notes += [{"id": 0, "image_id": number, "caption": text} for text in texts]
    for number, note in enumerate(notes):
        note["id"] = number
    info = {"description": f"Drawn scenes of asyncdiff_pl, split {split}", "version": "1.0"}
    content = {"info": info, "images": images, "annotations": notes}
    (folder / "captions.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
