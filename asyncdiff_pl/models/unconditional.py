"""The module that makes pictures with DDPMs: nothing is given but the number of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import nn
from typing_extensions import override

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import DiffusionPredictor
from asyncdiff_pl.models.loading import WeightsSource
from asyncdiff_pl.models.sources import find_folder, read_component_config, read_index, read_json
from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.sampling.respaced import RespacedScheduler, SamplerKind, Skip, Variance

MOST_HIDDEN_LEVELS = 2.0
"""Noise of which the network is not told, in levels of 255, above which the user is."""


class UnconditionalPredictor(DiffusionPredictor):
    """Makes pictures with an unconditional DDPM, by the steps of DDPM or of DDIM, over any of its timesteps.

    A picture follows from the run's seed and its own number, whatever the size of batches and the number of ranks, up
    to the rounding of a batch's computation.

    Args:
        pretrained: Checkpoint of a `DDPMPipeline` or `DDIMPipeline`: a hub name, a folder, as `fit` exports it, or the
            log folder of a run of `fit`.
        num_inference_steps: Number of denoising steps; a list makes every picture with each of them.
        sampler: `ddim`, or `ddpm`, which adds noise in each step (ancestral sampling).
        eta: Noise of DDIM's steps, from 0 (none) to 1.
        skip: Which timesteps are taken: `linear` spaces them evenly, `quadratic` evenly in their square roots.
        variance: Variance of DDPM's noise, `fixed_small` or `fixed_large`; null takes the checkpoint's, which may be
            learned. With few steps `fixed_large` leaves noise in the pictures.
        seed: Seed of the run.
        dtype: Number format of the network's weights and activations; states between steps are float32.
        weights: `pretrained` loads the checkpoint's weights; `random` builds the same network without them, for
            latency alone: its pictures mean nothing, and the results say so.
        variant: Variant of the checkpoint's weight files, `fp16` say; null takes the plain files.
        channels_last: Whether weights and activations are kept channels last: faster convolutions on a GPU, if the
            strategy compiles the network (`compile: full`).
    """

    pipeline_class = UnconditionalPipeline

    def __init__(
        self,
        pretrained: str,
        num_inference_steps: int | list[int] = 50,
        sampler: SamplerKind = "ddim",
        eta: float = 0.0,
        skip: Skip = "linear",
        variance: Variance | None = None,
        seed: int = 0,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        weights: WeightsSource = "pretrained",
        variant: str | None = None,
        channels_last: bool = False,
    ) -> None:
        exported = Path(pretrained).expanduser() / "export"
        pretrained = str(exported) if (exported / "model_index.json").is_file() else pretrained
        super().__init__(pretrained, num_inference_steps, None, seed, dtype, weights, variant)
        # says at once what is wrong with them
        RespacedScheduler(sampler=sampler, eta=eta, skip=skip)
        self.sampler = sampler
        self.eta = eta
        self.skip = skip
        self.variance = variance
        self.channels_last = channels_last

    @property
    @override
    def is_guided(self) -> bool:
        return False

    @override
    def picture_size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        size = (self._denoiser_config or {}).get("sample_size")
        return (size, size) if isinstance(size, int) else (None, None)

    @property
    def _denoiser_config(self) -> dict[str, object] | None:
        """The network's config; None for a hub checkpoint that is not known."""
        return None if read_index(self.pretrained) is None else read_component_config(self.pretrained, "unet")

    @override
    def example_call(self, height: int, width: int) -> tuple[nn.Module, tuple[object, ...], dict[str, object]] | None:
        if self._denoiser_config is None:
            return None
        with torch.device("meta"):
            network = UNet2DModel.from_config(self._denoiser_config).to(self.torch_dtype)
            state = torch.empty(1, network.config.in_channels, height, width, dtype=self.torch_dtype)
            return network, (state, torch.zeros(())), {}

    @override
    def check(self) -> None:
        super().check()
        folder = find_folder(self.pretrained)
        if folder is None:
            return
        config = read_json(folder / "scheduler", "scheduler_config.json", "the scheduler of a diffusers pipeline")
        total = config.get("num_train_timesteps", 1000)
        if max(self.num_inference_steps) > total:
            raise ValueError(
                f"num_inference_steps is {max(self.num_inference_steps)}, and {self.pretrained} has {total} timesteps; "
                "give as many at most."
            )

    @override
    def load(self) -> DiffusionPipeline:
        pipeline = super().load()
        changes = {"sampler": self.sampler, "eta": self.eta, "skip": self.skip}
        if self.variance is not None:
            changes["variance_type"] = self.variance
        pipeline.scheduler = scheduler = RespacedScheduler.like(pipeline.scheduler, **changes)
        self._tell_of_noise(scheduler)
        if self.channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
        return pipeline

    def _tell_of_noise(self, scheduler: RespacedScheduler) -> None:
        if self.sampler != "ddpm" or scheduler.config.variance_type != "fixed_large":
            return
        number = min(self.num_inference_steps)
        scheduler.set_timesteps(number)
        # data from -1 to 1
        levels = 127.5 * scheduler.hidden_noise
        if levels > MOST_HIDDEN_LEVELS:
            rank_zero_warn(
                f"ddpm with the variance fixed_large leaves noise in pictures of {number} steps of which the network "
                f"is not told, about {levels:.1f} of 255 levels; set variance to fixed_small, or take more steps."
            )

    @override
    def generate(
        self, samples: Sequence[Sample], num_inference_steps: int, generators: list[torch.Generator]
    ) -> list[list[Image.Image]]:
        seeds = [generator.initial_seed() for generator in generators]
        return [[picture] for picture in self.pipeline(seeds, num_inference_steps).images]
