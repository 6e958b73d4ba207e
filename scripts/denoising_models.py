"""Denoisers with random weights and the loops of their pipelines, for scripts/benchmark_denoising.py.

The loop is what diffusers' pipelines run between their encoders and their decoder: guidance batch, denoiser, guidance,
scheduler. Latency does not depend on weights, so nothing is downloaded. Sizes and steps are those that the models are
published for; tiny ones are for a CPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import MotionAdapter, UNetMotionModel
from PIL import Image
from torch import nn
from transformers.initialization import no_init_weights

from asyncdiff_pl.cli.overview import find_config
from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import DiffusionPredictor
from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.models.example_calls import TEXT_LENGTH
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import build_random_model, component_class
from asyncdiff_pl.models.schedulers import build_scheduler
from asyncdiff_pl.models.sources import ARCHITECTURES, find_folder, read_index
from asyncdiff_pl.parallel import Groups, Parallel, parallelize
from asyncdiff_pl.parallel.guidance import split_batch

PROMPT = "a black dog runs over a red bridge in the snow"


@dataclass(frozen=True)
class Kind:
    """A model, as it is measured.

    Args:
        config: Packaged config of the whole pipeline.
        steps: Denoising steps.
        latents: Shape of the latents of one sample; a video's has its frames in it.
        guidance: Guidance scale; of the first and of the last frame where it changes over them.
        changes: What differs from the config: arguments of its module, and `height` and `width` in pixels.
        unet: Entries of the denoiser's configuration that differ from the checkpoint's.
        motion: Folder of a motion adapter and entries of its configuration that differ; None where there is none.
        has_pipeline: Whether there is a whole pipeline of this size.
        is_half: Whether the denoiser gets one half of the guidance batch alone.
        forward_chunk: Frames whose feed-forward layers are computed at a time; None for all.
    """

    config: str
    steps: int
    latents: tuple[int, ...]
    guidance: float | tuple[float, float]
    changes: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    motion: tuple[str, Mapping[str, Any]] | None = None
    has_pipeline: bool = True
    is_half: bool = False
    forward_chunk: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the module, and size of the pictures."""
        config = yaml.safe_load(Path(find_config(self.config)).read_text(encoding="utf-8"))
        size = {name: config["data"]["init_args"].get(name) for name in ("height", "width")}
        return size | config["model"]["init_args"] | self.changes

    @property
    def predictor_class(self) -> type[DiffusionPredictor]:
        """The module that runs the whole pipeline."""
        config = yaml.safe_load(Path(find_config(self.config)).read_text(encoding="utf-8"))
        module, _, name = config["model"]["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name)


_ADAPTER = "motion-adapter-v1-5-3"
_HUB_ADAPTER = {"components": {"motion_adapter": f"guoyww/animatediff-{_ADAPTER}"}}
FULL = {
    "svd": Kind("svd_n2", 25, (25, 4, 72, 128), (1.0, 3.0)),
    "sdxl": Kind("sdxl_n2", 50, (4, 128, 128), 5.0),
    "sd21": Kind("sd21_n2", 50, (4, 96, 96), 7.5),
    "animatediff": Kind("animatediff_n2", 25, (4, 16, 64, 64), 7.5, _HUB_ADAPTER, motion=(_ADAPTER, {})),
}
"""Kinds by name, in the sizes that are published."""

_SQUARE = {"height": 64, "width": 64}
_WIDTHS = {"block_out_channels": [32, 64, 64]}
_HEADS = {"attention_head_dim": [1, 2, 2], "transformer_layers_per_block": [1, 1, 2], "layers_per_block": 1}
_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
_MOTION = {"motion_layers_per_block": 1}
TINY = {
    "svd": Kind("svd_n2", 9, (2, 4, 16, 16), (1.0, 3.0), _SQUARE | {"pretrained": "tiny-svd", "num_frames": 2}),
    "sdxl": Kind("sdxl_n2", 9, (4, 16, 16), 5.0, unet=_WIDTHS | _HEADS, has_pipeline=False),
    "sd21": Kind("sd21_n2", 9, (4, 16, 16), 7.5, _SQUARE | {"pretrained": "tiny-sd"}),
    "animatediff": Kind(
        *("animatediff_n2", 9, (4, 2, 16, 16), 7.5),
        unet=_WIDTHS | _LEVELS,
        motion=(_ADAPTER, _WIDTHS | _MOTION),
        has_pipeline=False,
    ),
}
"""The same kinds, tiny."""


class Denoising:
    """A denoiser on a device with all that its loop takes, and its pipeline around it if that is asked for.

    Args:
        kind: Which model.
        device: Where the denoiser computes; a pipeline's other parts are there only while the whole of it runs.
        dtype: Number format of weights and activations.
        with_pipeline: Whether the whole pipeline is built.
    """

    def __init__(self, kind: Kind, device: torch.device, dtype: torch.dtype, with_pipeline: bool = False) -> None:
        self.kind, self.device = kind, device
        self._predictor = build_predictor(kind, dtype) if with_pipeline else None
        if self._predictor is not None:
            self.denoiser, self.scheduler = self._predictor.denoiser, self._predictor.pipeline.scheduler
        else:
            self.denoiser, self.scheduler = build_denoiser(kind, device, dtype)
        self.denoiser.to(device)
        if kind.forward_chunk is not None:
            self.denoiser.enable_forward_chunking(kind.forward_chunk)
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self._noise = draw(1, *kind.latents)
        config = self.denoiser.config
        self._is_class_conditional = "num_embeds_ada_norm" in config and "cross_attention_dim" not in config
        # latents of the picture that a video starts from stand beside its own
        is_animated_picture = config["in_channels"] == 2 * config["out_channels"]
        self._picture = draw(2, *kind.latents) if is_animated_picture else None
        self._conditions = self._make_conditions(draw)
        if kind.is_half:
            forward, pair = self.denoiser.forward, torch.cat([self._noise] * 2)
            args, kwargs = split_batch(forward, (pair, 0), self._conditions, 1)
            bound = inspect.signature(forward).bind(*args, **kwargs).arguments
            self._conditions = {name: bound[name] for name in self._conditions}
            self._picture = self._picture[1:] if self._picture is not None else None
        self._guidance: Any = kind.guidance
        if isinstance(kind.guidance, tuple):
            frames = torch.linspace(*kind.guidance, kind.latents[0]).to(device, dtype)
            self._guidance = frames[None, :, None, None, None]

    def install(self, groups: Groups | None, **settings: Any) -> Parallel:
        """Runs the denoiser as `parallelize` does, until `remove()` of what is returned."""
        if self._predictor is not None:
            pipeline, trajectory = self._predictor.pipeline, self._predictor.trajectory
            own = {"pipe": pipeline, "trajectory": trajectory, "share_decoding": True}
        else:
            own = {"pipe": self.denoiser, "scheduler": self.scheduler}
        return parallelize(**own, groups=groups, **settings)

    @torch.no_grad()
    def loop(self, steps: int, mark: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Runs the denoising loop of one sample.

        Args:
            steps: Denoising steps.
            mark: Called before the first step, and in each step before the denoiser, after it, and at the end.

        Returns:
            The latents, `[1, ...]`.
        """
        mark()
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        latents = self._noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            given = latents if self.kind.is_half else torch.cat([latents] * 2)
            given = scheduler.scale_model_input(given, timestep)
            if self._picture is not None:
                given = torch.cat([given, self._picture], dim=2)
            mark()
            estimate = self._ask(given, timestep)
            mark()
            if not self.kind.is_half:
                unguided, guided = estimate.chunk(2)
                estimate = unguided + self._guidance * (guided - unguided)
            latents = scheduler.step(estimate, timestep, latents, return_dict=False)[0]
            mark()
        return latents

    def _ask(self, given: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The denoiser's estimate."""
        if not self._is_class_conditional:
            return self.denoiser(given, timestep, **self._conditions)[0]
        # DiT is told a timestep for each picture, and what it has learned of the variance has no use in DDIM
        return self.denoiser(given, timestep.repeat(len(given)), **self._conditions)[0][:, : given.shape[1]]

    @torch.no_grad()
    def whole(self, steps: int) -> float:
        """Seconds of the whole pipeline for one sample, from a prompt or a picture to pictures."""
        assert self._predictor is not None
        self._predictor.to(self.device)
        settings = self.kind.settings
        picture = Image.new("RGB", (settings["width"], settings["height"]), (90, 120, 160))
        (prediction,) = self._predictor.predict_step([Sample("one", (PROMPT,), picture, steps)])
        return prediction.seconds

    def put_away(self) -> None:
        """Takes all parts of the pipeline but the denoiser off the device."""
        assert self._predictor is not None
        for part in self._predictor.pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.denoiser:
                part.to("cpu")

    def _make_conditions(self, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """What pipelines tell the denoiser besides latents and timestep."""
        config, like = self.denoiser.config, self._noise
        if self._is_class_conditional:
            # the class after the last one is none
            classes = config["num_embeds_ada_norm"]
            labels = torch.tensor([classes, min(207, classes - 1)], device=like.device)
            return {"class_labels": labels, "return_dict": False}
        width = config["cross_attention_dim"]
        if self._picture is not None:
            times = torch.tensor([[6.0, 127.0, 0.02]] * 2, dtype=like.dtype, device=like.device)
            return {"encoder_hidden_states": draw(2, 1, width), "added_time_ids": times, "return_dict": False}
        texts, added = draw(2, TEXT_LENGTH, width), None
        if self.kind.motion is not None:
            texts = texts.repeat_interleave(self.kind.latents[1], dim=0)
        if config.get("addition_embed_type") == "text_time":
            numbers, pixels = 6, 8.0 * self.kind.latents[-1]
            pooled = config["projection_class_embeddings_input_dim"] - numbers * config["addition_time_embed_dim"]
            sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2, dtype=like.dtype, device=like.device)
            added = {"text_embeds": draw(2, pooled), "time_ids": sizes}
        kwargs = {"encoder_hidden_states": texts, "cross_attention_kwargs": None, "added_cond_kwargs": added}
        return kwargs | {"return_dict": False}


def build_denoiser(kind: Kind, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A denoiser alone, and the scheduler of its pipeline."""
    settings = kind.settings
    pretrained = settings["pretrained"]
    folder, index = find_folder(pretrained) or MODELS_FOLDER / ARCHITECTURES[pretrained][0], read_index(pretrained)
    assert index is not None
    with quiet_libraries():
        own_scheduler = component_class(*index["scheduler"]).from_pretrained(folder / "scheduler")
        scheduler = build_scheduler(settings.get("scheduler"), own_scheduler, settings.get("scheduler_config"))
        part = "unet" if "unet" in index else "transformer"
        unet = build_random_model(component_class(*index[part]), folder / part, dtype, kind.unet, part)
        if kind.motion is not None:
            adapter, changes = kind.motion
            motion = build_random_model(MotionAdapter, MODELS_FOLDER / adapter, dtype, changes, "motion_adapter")
            # it copies the weights of both: those that it starts with need no drawing
            with torch.device(device), no_init_weights():
                unet = UNetMotionModel.from_unet2d(unet.to(device), motion.to(device))
    # the method of diffusers' own class warns at each cast
    return nn.Module.to(unet, device, dtype).requires_grad_(False).eval(), scheduler


def build_predictor(kind: Kind, dtype: torch.dtype) -> DiffusionPredictor:
    """The module of a whole pipeline, on the CPU.

    Raises:
        ValueError: There is none of this size.
    """
    if not kind.has_pipeline:
        raise ValueError(f"There is no whole pipeline of a tiny {kind.config.partition('_')[0]}; leave it out.")
    predictor_class = kind.predictor_class
    known = inspect.signature(predictor_class).parameters
    settings = {name: value for name, value in kind.settings.items() if name in known}
    name = str(dtype).removeprefix("torch.")
    predictor = predictor_class(**settings | {"weights": "random", "variant": None, "dtype": name})
    predictor.configure_model()
    return predictor
