"""Pictures and clips as files to look at: in 8 bits, side by side in rows."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from asyncdiff_pl.report.sheet import draw_sheet


def rounded(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 1 as they are after they have been stored in 8 bits, float32."""
    return pixels.float().clamp(0, 1).mul(255).round() / 255


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures [N, 3, H, W] with values from 0 to 1 for pipelines, processors and files."""
    pixels = rounded(pictures).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def sheet(pictures: Tensor, columns: int, gap: int = 4, border: int = 0) -> Image.Image:
    """Pictures [N, 3, H, W] side by side in rows, on white.

    Args:
        pictures: Values from 0 to 1.
        columns: Pictures of a row.
        gap: Pixels between them.
        border: Pixels around them.
    """
    images = to_images(pictures)
    rows = [[images[start : start + columns]] for start in range(0, len(images), columns)]
    return draw_sheet(rows, gap=gap, between=gap, border=border)


def save_gif(clips: Tensor, path: Path, columns: int, fps: float, border: int = 0) -> None:
    """Clips [N, F, 3, H, W] side by side in rows, as an animation of `fps` frames a second."""
    frames = [sheet(clips[:, index], columns, border=border) for index in range(clips.shape[1])]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
