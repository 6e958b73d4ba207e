"""Scores each prediction against its sample's captions with CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import SampleCount, is_leader, tensorboard
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.models.clip import check_clip, is_random, load_clip


class CLIPScore(Callback):
    """Sets `score` of each prediction: 100 x cosine of frame and caption, mean over captions, then over frames.

    Only the first rank of a data group scores, on its own device and after the timed call; a sample without captions
    gets no score. TensorBoard shows the
    samples of rank 0's data group as `score/CLIP score (<model>)/steps=<n>`.

    Args:
        model: Model that scores: a hub name, a local folder, or the embedded `tiny-clip`; null scores nothing.
        batch_size: Frames in one forward pass.
        dtype: Number format of the scoring model.
    """

    def __init__(
        self,
        model: str | None = "openai/clip-vit-base-patch32",
        batch_size: int = 16,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a number of frames from 1 up.")
        self.model = model
        self.batch_size = batch_size
        self.dtype = {"float32": torch.float32, "float16": torch.float16}[dtype]
        self.scorer = "none"
        """What the results call the score: it names the model, since a small one's score is not that of a real one."""
        if model is not None:
            self.scorer = f"CLIP score ({model}{', random weights' if is_random(model) else ''})"
        self._score: TextImageScore | None = None
        self._count = SampleCount()
        self._has_warned = False

    def check(self) -> None:
        """Tells early that there is no such model, as far as that is known without fetching anything.

        Raises:
            ValueError: The folder is missing or holds no CLIP model.
        """
        if self.model is not None:
            check_clip(self.model)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" or self.model is None:
            return
        if getattr(pl_module, "weights", None) == "random":
            self.scorer = "none (random weights)"
            rank_zero_info("weights are random, as asked: the pictures mean nothing and are not scored")
            return
        self.check()  # on all ranks, so that none waits for one that has stopped
        # the first rank of each node goes first, so that a download happens once a node
        first = trainer.local_rank == 0
        loaded = load_clip(self.model) if first else None
        trainer.strategy.barrier("CLIPScore")
        if is_leader(trainer):
            model, processor = loaded or load_clip(self.model)
            model = model.to(trainer.strategy.root_device, self.dtype)
            self._score = TextImageScore(model, processor, self.batch_size)

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
        if self._score is None:
            return
        writer = tensorboard(trainer)
        for prediction in outputs:
            sample = prediction.sample
            if not sample.captions:
                if not self._has_warned:
                    warnings.warn(f"Sample {sample.id} has no captions: such samples get no score.", stacklevel=2)
                self._has_warned = True
                continue
            score = self._score(prediction.frames, sample.captions).item()
            prediction.metrics |= {"score": score, "scorer": self.scorer}
            if writer is not None:
                number = self._count.next(trainer, prediction.steps)
                writer.add_scalar(f"score/{self.scorer}/steps={prediction.steps}", score, number)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._score = None
