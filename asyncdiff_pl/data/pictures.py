"""Reads picture files and brings them to the size of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from asyncdiff_pl.data.sample import UnreadableSample

Fit = Literal["crop", "pad", "stretch"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""What the names of a folder's pictures end with, in lower case."""


def check_fit(fit: str, height: int | None, width: int | None) -> None:
    """Tells a size or a fit that no picture can be brought to.

    Args:
        fit: See `fit_image`.
        height: Height that pictures are brought to, in pixels; None leaves them as they are.
        width: Width that pictures are brought to, in pixels; None as well then.

    Raises:
        ValueError: In one sentence, with the value and the remedy.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height is {_or_null(height)} and width {_or_null(width)}; give both, or null for both.")
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 8 or pixels % 8):
            raise ValueError(f"{name} is {pixels} pixels; give a multiple of 8 from 8 up.")
    if fit not in get_args(Fit):
        raise ValueError(f"fit is {fit!r}; give crop, pad or stretch.")


def fit_image(
    image: Image.Image,
    width: int,
    height: int,
    fit: Fit,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Brings an image to a size.

    Args:
        image: RGB image, or a mask of one channel.
        width: Width of the result, in pixels.
        height: Height of the result, in pixels.
        fit: `crop` scales until the image covers the size and cuts off what juts out, equally on both sides; `pad`
            scales until it fits in and adds black bars, equally on both sides; `stretch` scales width and height
            apart.
        resampling: How pixels between pixels are found.
    """
    size = (width, height)
    if fit == "crop":
        return ImageOps.fit(image, size, resampling)
    if fit == "pad":
        # black in every mode
        return ImageOps.pad(image, size, resampling, color=None)
    return image.resize(size, resampling)


def read_picture(
    path: Path, width: int | None = None, height: int | None = None, fit: Fit = "crop", is_mask: bool = False
) -> Image.Image:
    """Reads a picture file, upright, in RGB.

    Args:
        path: The file, of any format that Pillow reads.
        width: Width that it is brought to, in pixels; None leaves the picture as it is.
        height: Height that it is brought to, in pixels; None as well then.
        fit: How a picture of another shape is brought to that size; see `fit_image`.
        is_mask: Gives one channel, and takes the nearest pixel where the size changes, so that no grey comes in.

    Raises:
        UnreadableSample: The file is missing, broken or no picture.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):
                # Pillow would cut all above 255 off; depth maps have 16 bits
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            picture = upright.convert("L" if is_mask else "RGB")
        if width is None or height is None:
            return picture
        resampling = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
        return fit_image(picture, width, height, fit, resampling)
    # whatever a broken file makes a decoder raise: Pillow's span OSError, SyntaxError, ValueError, struct.error ...
    except Exception as error:
        raise UnreadableSample(str(path), str(error) or type(error).__name__) from error


def _or_null(pixels: int | None) -> str:
    return "null" if pixels is None else str(pixels)
