"""Writes what was generated, while the next sample runs: single frames, animations, and both in TensorBoard."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import is_leader, log_folder, tensorboard, write_atomically
from asyncdiff_pl.models.base import Prediction

log = logging.getLogger(__name__)

BATCHES = 2
"""Batches whose frames are in memory at most, to be written: a slow disk holds the run up then."""

PREVIEW = 512
"""Longest side in pixels of what TensorBoard shows."""

DEFAULT_FPS = 7


class FrameWriter(Callback):
    """Writes each prediction to `frames/steps=<n>/` in the log folder.

    A single picture is `<id>.png`; a video is the folder `<id>` with `0000.png` and so on, and `<id>.gif` beside it.
    TensorBoard shows, of rank 0's data group, each sample's conditioning picture, `conditioning/<id>`, and what was
    generated, `generated/<id>`, with the step count as its step: so runs and step counts compare side by side.

    Frames are written in order by a thread of their own, so that the next sample need not wait for the disk. The run
    ends only when all are written, also where it is stopped; what cannot be written stops the run one batch later.

    Args:
        png: Whether the frames are written as pictures.
        animation: Format of a video's animation; `none` writes none.
        fps: Frames a second of an animation; null takes the module's `fps`, or 7 if it has none.
        max_tensorboard: Number of samples that TensorBoard shows.
    """

    def __init__(
        self,
        png: bool = True,
        animation: Literal["gif", "webp", "none"] = "gif",
        fps: int | None = None,
        max_tensorboard: int = 16,
    ) -> None:
        if fps is not None and not 1 <= fps <= 50:
            raise ValueError(f"fps is {fps}; give a number of frames a second from 1 to 50, or null.")
        self.png = png
        self.animation = animation
        self.fps = fps
        self.max_tensorboard = max_tensorboard
        self._folder: Path | None = None
        self._shown: set[str] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._batches: deque[list[Future[None]]] = deque()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer) / "frames"

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not is_leader(trainer):
            return
        fps = self.fps or getattr(pl_module, "fps", DEFAULT_FPS)
        writer = tensorboard(trainer)
        self._settle(BATCHES - 1)
        self._thread = self._thread or ThreadPoolExecutor(1, "frame_writer")
        self._batches.append([])
        for prediction in outputs:
            future = self._thread.submit(self._finish, prediction, writer, fps)
            self._batches[-1].append(future)
            prediction.pending.append(future)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(0)
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for future in [future for batch in self._batches for future in batch]:
            # the run ends for another reason, which must not be hidden
            if future.exception() not in (None, exception):
                log.error("Some frames could not be written: %s", future.exception())
        self._end()

    def _settle(self, most: int) -> None:
        """Waits until at most so many batches are still to be written, and raises what went wrong with the others."""
        while self._batches and (len(self._batches) > most or all(future.done() for future in self._batches[0])):
            for future in self._batches[0]:
                future.result()
            self._batches.popleft()

    def _end(self) -> None:
        self._batches.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _finish(self, prediction: Prediction, writer: SummaryWriter | None, fps: int) -> None:
        self._write(prediction, fps)
        if writer is not None:
            self._show(writer, prediction, fps)

    def _write(self, prediction: Prediction, fps: int) -> None:
        assert self._folder is not None
        folder, name = self._folder / f"steps={prediction.steps}", quote(prediction.sample.id, safe=" ")
        frames = prediction.frames
        if self.png and len(frames) == 1:
            write_atomically(folder / f"{name}.png", lambda file: frames[0].save(file, "PNG"))
        elif self.png:
            for index, frame in enumerate(frames):
                write_atomically(folder / name / f"{index:04}.png", lambda file, f=frame: f.save(file, "PNG"))
        if len(frames) > 1 and self.animation != "none":
            encoded = encode_gif(frames, fps) if self.animation == "gif" else encode_webp(frames, fps)
            write_atomically(folder / f"{name}.{self.animation}", lambda file: file.write(encoded))

    def _show(self, writer: SummaryWriter, prediction: Prediction, fps: int) -> None:
        sample = prediction.sample
        if sample.id not in self._shown:
            if len(self._shown) >= self.max_tensorboard:
                return
            self._shown.add(sample.id)
            if sample.image is not None:
                add_picture(writer, f"conditioning/{sample.id}", [sample.image], 0, fps)
        add_picture(writer, f"generated/{sample.id}", prediction.frames, prediction.steps, fps)


def add_picture(writer: SummaryWriter, tag: str, frames: Sequence[Image.Image], step: int, fps: int) -> None:
    """Shows a picture, or some frames as an animation, in TensorBoard, scaled down to 512 pixels at most.

    Args:
        writer: Writes TensorBoard's events.
        tag: Name in TensorBoard.
        frames: One picture, or the frames of a video.
        step: TensorBoard's step.
        fps: Frames a second.
    """
    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((PREVIEW, PREVIEW))
    image = Summary.Image(
        encoded_image_string=encode_png(small[0]) if len(small) == 1 else encode_gif(small, fps),
        height=small[0].height,
        width=small[0].width,
        colorspace=3,
    )
    # `add_video` needs an encoder of its own; TensorBoard plays an animated GIF that is logged as a picture
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def encode_png(frame: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    frame.save(file, "PNG")
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
