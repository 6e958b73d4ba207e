"""Pictures and animations as parts of a page: shrunk, encoded and written into its text, within a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from asyncdiff_pl.report.report_table import Entry
from asyncdiff_pl.report.sheet import scaled, some_of

SIDES = (256, 192, 128, 96)
"""Longest sides of the pictures in pixels; the first with which they fit is taken."""

FRAMES = 25
"""Most frames of an animation."""


@dataclass
class Shown:
    """One sample as several layouts make it.

    Args:
        title: What the sample is.
        pictures: Label of each layout, and its picture as the value of an `src`.
    """

    title: str
    pictures: list[tuple[str, str]]


def data_uri(content: bytes, kind: str) -> str:
    """A file as a part of the page itself.

    Args:
        content: The file.
        kind: Its type, `image/png`.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def embed(frames: Sequence[Image.Image], side: int, fps: float = 7) -> str:
    """One picture as a JPEG, or an animation of several as a WebP.

    Args:
        frames: The pictures.
        side: Longest side that they are brought to, in pixels; see `sheet.scaled`.
        fps: Frames a second.
    """
    chosen = [scaled(frame, side) for frame in some_of(frames, FRAMES)]
    file = io.BytesIO()
    if len(chosen) == 1:
        chosen[0].save(file, "JPEG", quality=88)
        return data_uri(file.getvalue(), "image/jpeg")
    duration = round(1000 / fps)
    chosen[0].save(file, "WEBP", save_all=True, append_images=chosen[1:], duration=duration, loop=0, quality=75)
    return data_uri(file.getvalue(), "image/webp")


def show_samples(entries: Sequence[Entry], number: int, limit: int) -> list[Shown]:
    """A few samples of the largest step count, as every layout that has their pictures makes them.

    Args:
        entries: Lines of runs that did the same work.
        number: Samples to show.
        limit: Bytes that they may take as text of the page.

    Returns:
        The samples, fewer of them where they do not fit in the smallest size.
    """
    steps = max(entry.run.steps for entry in entries)
    chosen = [entry for entry in entries if entry.run.steps == steps and entry.run.pictures.files]
    names = dict.fromkeys(name for entry in chosen for _, name in entry.run.pictures.files)
    # those that the most layouts have come first
    counts = {name: sum((steps, name) in entry.run.pictures.files for entry in chosen) for name in names}
    picked = sorted(names, key=lambda name: -counts[name])[:number]
    shown: list[Shown] = []
    for count in range(len(picked), 0, -1):
        for side in SIDES:
            shown = [_show(chosen, steps, name, side) for name in picked[:count]]
            if sum(len(source) for sample in shown for _, source in sample.pictures) <= limit:
                return shown
    return []


def _show(entries: Sequence[Entry], steps: int, name: str, side: int) -> Shown:
    having = [entry for entry in entries if (steps, name) in entry.run.pictures.files]
    captions = next((c for entry in having if (c := entry.run.pictures.captions.get(name))), ())
    fps = [entry.run.settings.get("module.fps") for entry in having]
    rate = next((float(value) for value in fps if value), 7.0)
    pictures = [(entry.run.label, embed(entry.run.pictures.frames((steps, name)), side, rate)) for entry in having]
    return Shown(" — ".join([name, *captions[:1]]), pictures)
