"""Draws scenes: a folder in COCO's format (pictures and captions) or, with --sheet, many scenes in one picture.

python scripts/draw_scenes.py --folder scenes --split test --count 100
python scripts/draw_scenes.py --sheet scenes.png --count 64 --columns 8
python scripts/draw_scenes.py --sheet scenes.gif --count 16 --columns 4 --frames 14
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from sheets import save_gif
from sheets import sheet as grid

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
        grid(clips.flatten(0, 1), frames, border=4).save(sheet)
    elif moving:
        save_gif(clips, sheet, columns, fps, border=4)
    else:
        grid(clips[:, 0], columns, border=4).save(sheet)


if __name__ == "__main__":
    auto_cli(draw_scenes)
