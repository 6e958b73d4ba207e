"""Writes what was generated, while the next sample runs: single frames, animations, and both in TensorBoard."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from asyncdiff_pl.callbacks.frame_encoder import FrameEncoder
from asyncdiff_pl.callbacks.frame_files import Preview
from asyncdiff_pl.callbacks.roles import is_leader, log_folder, tensorboard
from asyncdiff_pl.models.base import Prediction

log = logging.getLogger(__name__)

BATCHES = 2
"""Batches whose frames are in memory at most, to be written: a slow disk holds the run up then."""

DEFAULT_FPS = 7


class FrameWriter(Callback):
    """Writes each prediction to `frames/steps=<n>/` in the log folder.

    A single picture is `<id>.png`; a video is the folder `<id>` with `0000.png` and so on, and `<id>.gif` beside it.
    TensorBoard shows, of rank 0's data group, each sample's conditioning picture, `conditioning/<id>`, and what was
    generated, `generated/<id>`, with the step count as its step: so runs and step counts compare side by side. What it
    shows is scaled down: a picture to 512 pixels at most, a video to 256 or, to keep its file below 0.5 MiB, to fewer.

    Frames are encoded and written in order by a process of their own, so that the next sample waits neither for the
    disk nor for Python. The run ends only when all are written, also where it is stopped; what cannot be written stops
    the run one batch later.

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
        self._encoder: FrameEncoder | None = None
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
        errors = dict.fromkeys(future.exception() for batch in self._batches for future in batch)
        for error in errors:
            # the run ends for another reason, which must not be hidden
            if error not in (None, exception):
                log.error("Some frames could not be written: %s", error)
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
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    # -- in the thread, which hands frames to the process and waits -------------------------------------------------

    def _finish(self, prediction: Prediction, writer: SummaryWriter | None, fps: int) -> None:
        sample, frames = prediction.sample, prediction.frames
        pictures, animation = self._files(prediction)
        is_new = sample.id not in self._shown
        is_shown = writer is not None and not (is_new and len(self._shown) >= self.max_tensorboard)
        if not (pictures or animation or is_shown):
            return
        self._encoder = self._encoder or FrameEncoder()
        generated = self._encoder.encode(frames, pictures, animation, fps, is_shown)
        if writer is None or generated is None:
            return
        self._shown.add(sample.id)
        if is_new and sample.image is not None:
            conditioning = self._encoder.encode([sample.image.convert("RGB")], is_shown=True)
            assert conditioning is not None
            add_picture(writer, f"conditioning/{sample.id}", conditioning, 0)
        add_picture(writer, f"generated/{sample.id}", generated, prediction.steps)

    def _files(self, prediction: Prediction) -> tuple[list[Path], Path | None]:
        """Where each frame is written, and where the animation is; none where they are not."""
        assert self._folder is not None
        folder, name = self._folder / f"steps={prediction.steps}", quote(prediction.sample.id, safe=" ")
        number = len(prediction.frames)
        pictures = [folder / f"{name}.png"]
        if number > 1:
            pictures = [folder / name / f"{index:04}.png" for index in range(number)]
        is_animated = number > 1 and self.animation != "none"
        return pictures if self.png else [], folder / f"{name}.{self.animation}" if is_animated else None


def add_picture(writer: SummaryWriter, tag: str, preview: Preview, step: int) -> None:
    """Shows a picture, or an animation, in TensorBoard.

    Args:
        writer: Writes TensorBoard's events.
        tag: Name in TensorBoard.
        preview: A file in a format that browsers show, its width and height.
        step: TensorBoard's step.
    """
    encoded, width, height = preview
    image = Summary.Image(encoded_image_string=encoded, height=height, width=width, colorspace=3)
    # `add_image` encodes in this process, and `add_video` needs an encoder of its own; TensorBoard plays an animated
    # GIF that is logged as a picture
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
