"""Pictures side by side on white: rows of cells with titles above the columns and a text above each row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

TEXT = 15
"""Height of the letters, in pixels."""

LINE = 20
"""Height of a line of text, in pixels."""

Cell = Sequence[Image.Image]
"""Pictures that stand close together: one, or some frames of a video."""


def draw_sheet(
    rows: Sequence[Sequence[Cell]],
    titles: Sequence[str] = (),
    texts: Sequence[str] = (),
    gap: int = 2,
    between: int = 2,
    border: int = 0,
) -> Image.Image:
    """Draws a sheet; all rows have the same columns.

    Args:
        rows: For each row the cells of its columns.
        titles: What stands above the columns; empty for nothing.
        texts: What stands above each row, broken into lines where it is too long; empty for nothing.
        gap: Pixels between the pictures of a cell.
        between: Pixels between cells, and between rows.
        border: Pixels around it all.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not rows or not rows[0]:
        raise ValueError("There are no pictures to draw a sheet of; give one or more rows.")
    font = ImageFont.load_default(TEXT)
    columns = range(len(rows[0]))
    widths = [max(sum(picture.width for picture in row[k]) + gap * (len(row[k]) - 1) for row in rows) for k in columns]
    if titles:
        widths = [max(width, round(font.getlength(title))) for width, title in zip(widths, titles, strict=True)]
    width = sum(widths) + between * (len(widths) - 1)
    letters = max(10, round(width / font.getlength("abcdefghijklmnopqrstuvwxyz") * 26))
    lines = [textwrap.wrap(text, letters) for text in texts] or [[] for _ in rows]
    heights = [max(picture.height for cell in row for picture in cell) for row in rows]
    text_heights = [LINE * len(found) + 2 * bool(found) for found in lines]
    height = bool(titles) * (LINE + 2) + sum(heights) + sum(text_heights) + between * (len(rows) - 1)
    page = Image.new("RGB", (width + 2 * border, height + 2 * border), "white")
    pen = ImageDraw.Draw(page)
    lefts = [border + sum(widths[:k]) + between * k for k in columns]
    top = border
    if titles:
        for left, title in zip(lefts, titles, strict=True):
            pen.text((left, top), title, fill="black", font=font)
        top += LINE + 2
    for row, found, row_height, text_height in zip(rows, lines, heights, text_heights, strict=True):
        for number, line in enumerate(found):
            pen.text((border, top + LINE * number), line, fill="black", font=font)
        top += text_height
        for left, cell in zip(lefts, row, strict=True):
            for picture in cell:
                page.paste(picture, (left, top))
                left += picture.width + gap
        top += row_height + between
    return page


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """A picture with a longest side of about so many pixels: large ones shrunk, small ones in whole multiples.

    Args:
        picture: Any picture.
        side: Longest side that it is brought to, in pixels.
    """
    longest = max(picture.size)
    if longest > side:
        size = (max(1, round(length * side / longest)) for length in picture.size)
        return picture.resize(tuple(size), Image.Resampling.LANCZOS)
    # whole multiples: each pixel stays what it is
    return picture.resize([length * (side // longest) for length in picture.size], Image.Resampling.NEAREST)


def some_of(frames: Sequence[Image.Image], number: int) -> list[Image.Image]:
    """Some frames of a video, from its first to its last; a single picture is one frame."""
    count = min(number, len(frames))
    return [frames[round(k * (len(frames) - 1) / max(1, count - 1))] for k in range(count)]
