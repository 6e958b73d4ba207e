"""The data module for training: scenes without end, worded in the workers and drawn on the device."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from asyncdiff_pl.data.image_sets import kept_archive
from asyncdiff_pl.data.scenes import (
    BACKGROUNDS,
    CLASS_NAMES,
    NUM_WORDINGS,
    SIZES,
    Scenes,
    Split,
    captions,
    changed_captions,
    class_caption,
    class_of,
    draw,
    sample_scenes,
)
from asyncdiff_pl.data.workers import worker_settings

TokenMaker = Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[Tensor, Tensor]]
"""Turns captions and changed captions into tokens."""
NUM_REAL = 10_000
"""Scenes that stand for all of them, which have no end."""
DRAWN_AT_ONCE = 256
"""Scenes in memory while they are drawn."""
SceneMaker = Callable[..., Scenes]
"""`sample_scenes` with its settings."""


@dataclass
class SceneBatches(IterableDataset):
    """Batches of scenes without their pictures, each in its place: batch n of a rank is the same in every run.

    With `repeat`, as many places in a row have the same batch.

    Args:
        split: Which scenes.
        batch_size: Scenes of a batch.
        first: Number of the first batch of this rank.
        number: Batches; None for no end.
        rank: Which of the ranks this one is; ranks take other scenes.
        ranks: How many ranks there are.
        fps: Least and highest frame rate, whole numbers of frames a second.
        sample: Makes the scenes of indices of a split.
        changed: Number of changed captions of each scene.
        class_captions: Share of all captions that only name the class of a scene's single object.
        tokenize: Makes tokens of the captions as well.
        repeat: Times that a batch comes in a row.
    """

    split: Split
    batch_size: int
    first: int
    number: int | None
    rank: int
    ranks: int
    fps: tuple[int, int]
    sample: SceneMaker
    changed: int
    class_captions: float = 0.0
    tokenize: TokenMaker | None = None
    repeat: int = 1

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        step, place = (1, 0) if worker is None else (worker.num_workers, worker.id)
        while self.number is None or place < self.number:
            yield self.batch(self.first + place)
            place += step

    def batch(self, place: int) -> dict[str, Any]:
        """The batch in place `place` of this rank: its number, index, fps, captions, changed captions and labels."""
        number = place // self.repeat
        start = (number * self.ranks + self.rank) * self.batch_size
        index = torch.arange(start, start + self.batch_size)
        # a state of its own: a batch depends on its number alone
        generator = torch.Generator().manual_seed(start)
        scenes = self.sample(index, self.split)
        low, high = self.fps
        label = class_of(scenes)
        texts, changes = self._texts(scenes, generator)
        caption_label = self._shorten(scenes, label, texts, changes, generator)
        batch = {
            "number": number,
            "index": index,
            "fps": torch.randint(low, high + 1, (self.batch_size,), generator=generator).float(),
            "captions": texts,
            "changed_captions": changes,
            "label": label,
            "caption_label": caption_label,
        }
        if self.tokenize is not None:
            batch["tokens"], batch["changed_tokens"] = self.tokenize(texts, changes)
        return batch

    def _texts(self, scenes: Scenes, generator: torch.Generator) -> tuple[list[str], list[list[str]]]:
        """For each scene one of its captions, and changed ones of the same wording."""
        wordings = torch.randint(NUM_WORDINGS, (len(scenes),), generator=generator)
        texts = [five[wording] for five, wording in zip(captions(scenes), wordings.tolist(), strict=True)]
        changes: list[list[str]] = [[] for _ in texts]
        for wording in range(NUM_WORDINGS if self.changed else 0):
            (rows,) = torch.where(wordings == wording)
            if len(rows):
                found = changed_captions(scenes[rows], self.changed, wording)
                for row, change in zip(rows.tolist(), found, strict=True):
                    changes[row] = change
        return texts, changes

    def _shorten(
        self,
        scenes: Scenes,
        label: Tensor,
        texts: list[str],
        changes: list[list[str]],
        generator: torch.Generator,
    ) -> Tensor:
        """Names only the class in some captions of single objects; labels [B] of these captions, -1 of the others."""
        single = scenes.number == 1
        share = self.class_captions * len(single) / single.sum().clamp(min=1)
        chosen = single & (torch.rand(len(single), generator=generator) < share)
        for row in torch.where(chosen)[0].tolist():
            own = int(label[row])
            others = torch.randperm(len(CLASS_NAMES) - 1, generator=generator)[: self.changed].tolist()
            texts[row] = class_caption(CLASS_NAMES[own])
            changes[row] = [class_caption(CLASS_NAMES[other + (other >= own)]) for other in others]
        return torch.where(chosen, label, -1)


class SceneClips(LightningDataModule):
    """Clips of scenes that the package draws itself, with captions: training scenes never come twice.

    The workers make the captions, the training device draws. A run that goes on continues with the scenes that come
    next, and each rank has scenes of its own; validation scenes are the same each time.

    Args:
        batch_size: Clips of a batch, on each rank.
        num_frames: Frames of a clip; 1 gives pictures.
        size: Height and width of the pictures, in pixels.
        min_fps: Least frame rate, a whole number of frames a second.
        max_fps: Highest frame rate; clips have all whole numbers between.
        max_start: Latest start of a training clip, in s; captions describe scenes as they are at 0 s.
        max_objects: Most objects of a scene, 1 to 3.
        sizes: Sizes that objects have, of small, medium and large; null for all. Objects that are large alone need
            `max_objects` 1.
        backgrounds: Backgrounds that scenes have, of gradient, spotlight, stripes, checkered floor, hills, mountains,
            sea, sunset, clouds, night sky and blurred lights; null for all.
        changed_captions: Captions of each scene that are wrong in one attribute.
        validation_changed_captions: The same for validation scenes; the number of `changed_captions` if null.
        class_captions: Share of training captions that are short and name the class alone; single objects have them.
        repeat: Training steps in a row that have the same clips and captions, each with noise of its own. Drawing and
            encoding clips takes about as long as a step of a small denoiser, and is then done once for all of them.
        validation_batches: Number of validation batches, shared out over the ranks.
        num_workers: Processes that make captions; 0 makes them in the training process.
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_frames: int = 8,
        size: int = 128,
        min_fps: int = 5,
        max_fps: int = 10,
        max_start: float = 0.0,
        max_objects: int = 3,
        sizes: list[str] | None = None,
        backgrounds: list[str] | None = None,
        changed_captions: int = 0,
        validation_changed_captions: int | None = None,
        class_captions: float = 0.0,
        repeat: int = 1,
        validation_batches: int = 8,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        least = {
            "batch_size": batch_size,
            "num_frames": num_frames,
            "size": size,
            "repeat": repeat,
            "validation_batches": validation_batches,
        }
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}; give a number from 1 up.")
        if not 2 <= min_fps <= max_fps:
            raise ValueError(f"min_fps is {min_fps} and max_fps {max_fps}; give 2 <= min_fps <= max_fps.")
        if not 1 <= max_objects <= 3:
            raise ValueError(f"max_objects is {max_objects}; give 1, 2 or 3.")
        self.sample = functools.partial(
            sample_scenes,
            max_objects=max_objects,
            sizes=SIZES if sizes is None else sizes,
            backgrounds=BACKGROUNDS if backgrounds is None else backgrounds,
        )
        """Makes the scenes of indices of a split."""
        # says what is wrong before anything runs
        self.sample(torch.arange(1))
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.size = size
        self.fps = (min_fps, max_fps)
        self.max_start = max_start
        self.changed = changed_captions
        self.validation_changed = (
            changed_captions if validation_changed_captions is None else validation_changed_captions
        )
        self.class_captions = class_captions
        self.repeat = repeat
        self.validation_batches = validation_batches
        self.num_workers = num_workers
        self.tokenize: TokenMaker | None = None
        """Makes tokens in the workers, if a module sets it."""
        self._drawn: tuple[int, Tensor] | None = None
        """Number and clips of the training batch that was drawn last."""

    @torch.no_grad()
    def real_pictures(self, number: int | None = None) -> Path:
        """Draws the first frames of the first training scenes into a file of the cache folder, if it is not there.

        Args:
            number: So many; None for 10,000.

        Returns:
            The .npz file, as callbacks take real pictures.
        """
        number = NUM_REAL if number is None else number
        scenes = self.sample(torch.arange(number))
        # what they look like follows from the scenes and from the code that draws
        code = sorted(Path(inspect.getfile(draw)).parent.glob("*.py"))
        known = [repr((number, self.size)).encode(), *(value.numpy().tobytes() for value in vars(scenes).values())]
        known += [file.read_bytes() for file in code]

        def make() -> Tensor:
            places = torch.arange(number).split(DRAWN_AT_ONCE)
            drawn = [draw(scenes[rows], torch.zeros(len(rows), 1), self.size)[:, 0] for rows in places]
            return (torch.cat(drawn) * 255).round().byte()

        return kept_archive("scenes", b"".join(known), make)

    @override
    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return self._loader("train", first=done, number=None)

    @override
    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        # every rank has as many: their collectives go in step
        return self._loader("validation", first=0, number=-(-self.validation_batches // self.trainer.world_size))

    def _loader(self, split: Split, first: int, number: int | None) -> DataLoader:
        assert self.trainer is not None
        is_training = split == "train"
        batches = SceneBatches(
            split,
            self.batch_size,
            first,
            number,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.fps,
            self.sample,
            self.changed if is_training else self.validation_changed,
            self.class_captions if is_training else 0.0,
            self.tokenize,
            self.repeat if is_training else 1,
        )
        workers = self.num_workers if is_training else min(1, self.num_workers)
        return DataLoader(
            batches,
            batch_size=None,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            **worker_settings(batches, workers),
        )

    @override
    @torch.no_grad()
    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws the clips on the device that the batch is on."""
        assert self.trainer is not None
        if not self.trainer.training:
            # the last batches of some ranks are there for others', whose number does not divide by the ranks
            place = batch["number"] * self.trainer.world_size + self.trainer.global_rank
            counted = self.batch_size if place < self.validation_batches else 0
            return {**batch, "frames": self._draw(batch, "validation"), "counted": counted}
        number = batch["number"]
        if self._drawn is None or self._drawn[0] != number or self._drawn[1].device != batch["fps"].device:
            # what was drawn before is let go first: a batch of clips is large
            self._drawn = None
            self._drawn = number, self._draw(batch, "train")
        return {**batch, "frames": self._drawn[1]}

    def _draw(self, batch: dict[str, Any], split: Split) -> Tensor:
        """Clips [B, F, 3, H, W] from 0 to 1."""
        fps = batch["fps"]
        times = torch.arange(self.num_frames, device=fps.device) / fps[:, None]
        if split == "train" and self.max_start:
            times = times + self.max_start * torch.rand_like(fps)[:, None]
        return draw(self.sample(batch["index"], split), times, self.size)
