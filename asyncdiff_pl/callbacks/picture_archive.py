"""All pictures of a run in one file: thousands of small ones are slow to write, and to read, as files of their own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.callbacks.roles import data_rank, gather, is_leader, log_folder
from asyncdiff_pl.models.base import Prediction


class PictureArchive(Callback):
    """Writes `pictures/steps=<n>.npz` to the log folder: `images` [N, H, W, 3] of uint8, and `id` [N], by number.

    Each batch is on disk at its end, in a part of its own, so that a run that goes on has what was done; the parts are
    put together at the end of the run. It is for single pictures of one size; set `frame_writer.png: false` with it.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer) / "pictures"

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
        assert self._folder is not None
        if not is_leader(trainer):
            return
        for steps in dict.fromkeys(prediction.steps for prediction in outputs):
            made = [prediction for prediction in outputs if prediction.steps == steps]
            images = np.stack([np.asarray(prediction.frames[0]) for prediction in made])
            ids = np.array([prediction.sample.id for prediction in made])
            # the ids tell parts of several starts apart
            name = f"steps={steps}.part{data_rank(trainer)}-{ids[0]}.npz"
            write_atomically(self._folder / name, _encoded(images, ids))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._folder is not None
        # the parts themselves meet, not only their files: data groups need not share a disk
        found = gather(trainer, {part.name: part.read_bytes() for part in self._folder.glob("*.part*.npz")})
        if found is None:
            return
        parts = {name: content for own in found for name, content in own.items()}
        for steps in sorted({name.partition(".")[0] for name in parts}):
            chosen = [np.load(io.BytesIO(parts[name])) for name in parts if name.partition(".")[0] == steps]
            path = self._folder / f"{steps}.npz"
            if path.exists():
                chosen.insert(0, np.load(io.BytesIO(path.read_bytes())))
            ids = np.concatenate([part["id"] for part in chosen])
            images = np.concatenate([part["images"] for part in chosen])
            # one that was made twice counts once
            _, places = np.unique(ids, return_index=True)
            order = sorted(places, key=lambda place: (not ids[place].isdecimal(), len(ids[place]), ids[place]))
            write_atomically(path, _encoded(images[order], ids[order]))
            print(f"asyncdiff_pl: {len(order)} pictures in {path}", flush=True)
        for part in self._folder.glob("*.part*.npz"):
            part.unlink()


def _encoded(images: np.ndarray, ids: np.ndarray) -> bytes:
    """An .npz file."""
    file = io.BytesIO()
    np.savez(file, images=images, id=ids)
    return file.getvalue()
