"""Draws scenes: a folder in COCO's format (pictures and captions) or, with --sheet, many scenes in one picture.

python scripts/draw_scenes.py --folder scenes --split test --count 100
python scripts/draw_scenes.py --sheet scenes.png --count 64 --columns 8
python scripts/draw_scenes.py --sheet scenes.gif --count 16 --columns 4 --frames 14
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from asyncdiff_pl.data.scenes import Split, captions, draw, sample_scenes, write_coco
from asyncdiff_pl.data.scenes.coco_folder import ImageFormat


def draw_scenes(
    folder: Path | None = None,
    sheet: Path | None = None,
    split: Split = "train",
    count: int = 64,
    start: int = 0,
    size: int = 128,
    max_objects: int = 3,
    image_format: ImageFormat = "png",
    columns: int = 8,
    frames: int = 8,
    fps: float = 7.0,
    say: bool = False,
) -> None:
    """Draws captioned scenes.

    Args:
        folder: Folder that gets pictures and captions in COCO's format; null writes none.
        sheet: Picture that shows all scenes in a grid: a .png of time 0, or a .gif of the clips; null draws none.
        split: Which scenes: train, validation, test or demo; they have none in common.
        count: Number of scenes.
        start: Index of the first scene.
        size: Side of a scene in pixels.
        max_objects: Largest number of objects of a scene, 1 to 3.
        image_format: Format of the folder's pictures, png or jpg.
        columns: Scenes in a row of the sheet; 0 gives each scene a row of its frames.
        frames: Frames of each clip.
        fps: Frames a second of the clips.
        say: Prints the scenes' captions.
    """
    if folder is None and sheet is None and not say:
        raise ValueError("Nothing to do: give --folder, --sheet or --say true.")
    if folder is not None:
        write_coco(folder, split, count, size, start, max_objects=max_objects, image_format=image_format)
    scenes = sample_scenes(torch.arange(start, start + count), split, max_objects=max_objects)
    if say:
        for number, texts in zip(scenes.index.tolist(), captions(scenes), strict=True):
            print(f"{number}:", *texts, sep="\n  ")
    if sheet is None:
        return
    moving = sheet.suffix == ".gif" or columns == 0
    times = (torch.arange(frames if moving else 1) / fps).expand(count, -1)
    # a few scenes at a time: a clip takes some hundred megabytes while it is drawn
    parts = [draw(scenes[first : first + 8], times[first : first + 8], size) for first in range(0, count, 8)]
    clips = torch.cat(parts)
    if columns == 0:
        _picture(clips.flatten(0, 1), frames).save(sheet)
    elif moving:
        pictures = [_picture(clips[:, number], columns) for number in range(frames)]
        pictures[0].save(sheet, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    else:
        _picture(clips[:, 0], columns).save(sheet)


def _picture(images: Tensor, columns: int, margin: int = 4) -> Image.Image:
    """Images (N, 3, size, size) in a white grid."""
    size = images.shape[-1] + margin
    rows = -(-len(images) // columns)
    canvas = torch.ones(3, rows * size + margin, columns * size + margin)
    for number, image in enumerate(images):
        y, x = (margin + size * place for place in divmod(number, columns))
        canvas[:, y : y + size - margin, x : x + size - margin] = image
    return Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    auto_cli(draw_scenes)
