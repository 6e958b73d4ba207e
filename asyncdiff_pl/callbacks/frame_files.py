"""Frames as files: encoded as PNG, GIF or WebP, or as a small preview, and written whole.

The file is a program as well: `frame_encoder.py` starts it, to encode in a process of its own. It therefore needs
Pillow alone, and no other file of the package: that process starts in a tenth of a second, and holds no torch.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from PIL import Image

Preview = tuple[bytes, int, int]
"""A small file, its width and its height in pixels: a plain tuple, since it goes from process to process."""

PICTURE_SIDE = 512
"""Longest side in pixels of a single picture's preview."""

ANIMATION_SIDE = 256
"""Longest side in pixels of an animation's preview."""

PREVIEW_BYTES = 2**19
"""Most bytes of a preview: TensorBoard's event writer takes 80 ms of Python for each MiB, while the run goes on."""

SMALLEST_SIDE = 32
"""Longest side in pixels below which no preview is made smaller for the sake of its bytes."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that takes its name only when it is complete, so that no half file is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


# -- encoding ---------------------------------------------------------------------------------------------------


def encode_png(frame: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    frame.save(file, "PNG")
    return file.getvalue()


def encode_jpeg(frame: Image.Image) -> bytes:
    """A picture as a JPEG file, of which the eye does not tell that something is lost."""
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=90)
    return file.getvalue()


def encode_gif(frames: Sequence[Image.Image], fps: int) -> bytes:
    """Frames as an endless GIF.

    All frames share the 256 colours that fit all of them best: with a palette for each frame the colours flicker.

    Args:
        frames: Pictures of one size.
        fps: Frames a second; a GIF rounds the time of a frame to 1/100 s.
    """
    frames = [frame.convert("RGB") for frame in frames]
    palette = shared_palette(frames)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    file = io.BytesIO()
    duration = 10 * max(2, round(100 / fps))
    indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=duration, loop=0)
    return file.getvalue()


def encode_webp(frames: Sequence[Image.Image], fps: int) -> bytes:
    """Frames as an endless animated WebP, in all colours."""
    file = io.BytesIO()
    duration = round(1000 / fps)
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=90)
    return file.getvalue()


def shared_palette(frames: Sequence[Image.Image]) -> Image.Image:
    """The 256 colours that fit some frames of one size, taken from at most eight of them put side by side."""
    picked = frames[:: -(-len(frames) // 8)]
    width, height = picked[0].size
    scale = min(1.0, 256 / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = Image.new("RGB", (width * len(picked), height))
    for index, frame in enumerate(picked):
        # nearest: a mean of neighbours would be a colour that no frame has
        sheet.paste(frame.resize((width, height), Image.Resampling.NEAREST), (index * width, 0))
    # median cut spends its colours on large areas: a third more error on photographs, and dots in small bright ones
    return sheet.quantize(256, method=Image.Quantize.FASTOCTREE)


def encode_preview(frames: Sequence[Image.Image], fps: int) -> Preview:
    """What TensorBoard shows: a picture as a JPEG file, a video as a GIF, made small enough for `PREVIEW_BYTES`.

    Args:
        frames: One picture, or the frames of a video, of one size.
        fps: Frames a second.
    """
    side = PICTURE_SIDE if len(frames) == 1 else ANIMATION_SIDE
    while True:
        small = [frame.convert("RGB") for frame in frames]
        for frame in small:
            frame.thumbnail((side, side))
        encoded = encode_jpeg(small[0]) if len(small) == 1 else encode_gif(small, fps)
        if len(encoded) <= PREVIEW_BYTES or side <= SMALLEST_SIDE:
            return encoded, *small[0].size
        side = side * 3 // 4


# -- as a program -----------------------------------------------------------------------------------------------


def encode(
    frames: Sequence[Image.Image], pictures: Sequence[Path], animation: Path | None, fps: int, is_shown: bool
) -> Preview | None:
    """Writes the files of one sample, and makes its preview.

    Args:
        frames: One picture, or the frames of a video, of one size.
        pictures: Where each frame is written as a PNG file; none where they are not.
        animation: Where all are written as a GIF or a WebP, as its ending says; None where they are not.
        fps: Frames a second.
        is_shown: Whether a preview is made.

    Raises:
        OSError: A file could not be written.
    """
    for path, frame in zip(pictures, frames, strict=False):
        write_atomically(path, encode_png(frame))
    if animation is not None:
        write_atomically(animation, encode_gif(frames, fps) if animation.suffix == ".gif" else encode_webp(frames, fps))
    return encode_preview(frames, fps) if is_shown else None


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until there are no more.

    A request is the number of frames with the other arguments of `encode`, then each frame, all of them pickled; its
    answer is what `encode` returns, or the error that it raises.

    Args:
        requests: Where they come from.
        answers: Where they go.
    """
    while True:
        try:
            number, settings = pickle.load(requests)
            frames = [pickle.load(requests) for _ in range(number)]
        except (EOFError, pickle.UnpicklingError):
            # closed, or cut off in the middle: who asked is gone
            return
        answer: Preview | Exception | None
        try:
            answer = encode(frames, **settings)
        except Exception as error:
            answer = error
            if not isinstance(error, OSError):
                # a disk that is full is told in a word, a fault is looked for
                error.add_note("".join(traceback.format_exception(error)))
        del frames
        pickle.dump(answer, answers)
        answers.flush()


def _end_with_requests() -> None:
    """Ends this process when the one that asks is gone: one that resumes its run may write the same files soon."""
    watch = select.poll()
    # no event but that of the other end being closed, which is told of in any case
    watch.register(sys.stdin, 0)
    watch.poll()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_requests, daemon=True).start()
    serve(sys.stdin.buffer, sys.stdout.buffer)
