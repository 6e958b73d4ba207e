"""What is known of a pipeline before it is loaded, by its checkpoint's index and configurations alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline
from torch import nn

from asyncdiff_pl.models.call import CallTemplate
from asyncdiff_pl.models.components import read_part_config
from asyncdiff_pl.models.example_calls import (
    embeds_guidance,
    example_call,
    latent_size,
    motion_call,
    pixels_per_latent,
    size_multiple,
)
from asyncdiff_pl.models.loading import init_parameters
from asyncdiff_pl.models.random_weights import component_class
from asyncdiff_pl.models.sources import read_component_config, read_index


class ForeknownPipeline:
    """A pipeline as its checkpoint describes it; of one on a hub that is not at hand it knows nothing.

    Args:
        pretrained: The checkpoint.
        kind: Class of the pipeline; `DiffusionPipeline` for the checkpoint's own.
        components: Parts that are loaded from elsewhere.
        given: Arguments of the pipeline's call that the user set.
        has_ip_adapter: Whether an IP-Adapter is to be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        kind: type[DiffusionPipeline],
        components: Mapping[str, str | list[str] | None],
        given: dict[str, Any],
        has_ip_adapter: bool,
    ) -> None:
        self._pretrained = pretrained
        self._told_kind = kind
        self._components = components
        self._given = given
        self._has_ip_adapter = has_ip_adapter

    @functools.cached_property
    def kind(self) -> type[DiffusionPipeline] | None:
        """The pipeline's class; None for a hub checkpoint that is not known and says it itself."""
        if self._told_kind is not DiffusionPipeline:
            return self._told_kind
        index = self._index
        return None if index is None else component_class("diffusers", index["_class_name"])

    @functools.cached_property
    def template(self) -> CallTemplate | None:
        """The arguments of its call; None where its class is not known."""
        return None if self.kind is None else self._template_of(self.kind)

    def loaded(self, kind: type[DiffusionPipeline]) -> CallTemplate:
        """Takes over what loading it told.

        Args:
            kind: Its class.

        Returns:
            The arguments of its call.
        """
        self.kind = kind
        self.template = self._template_of(kind)
        return self.template

    @functools.cached_property
    def denoiser(self) -> tuple[str, dict[str, Any]] | None:
        """Class name and configuration of the denoiser."""
        index = self._index
        for name in ("unet", "transformer") if index is not None else ():
            if (index.get(name) or [None])[0] is not None and name not in self._components:
                config = read_component_config(self._pretrained, name)
                return None if config is None else (index[name][1], config)
        return None

    @property
    def num_frames(self) -> int:
        """Frames of a result; 1 for a picture."""
        told = self.template.value("num_frames") if self.template else self._given.get("num_frames")
        return told or 1

    @property
    def size_multiple(self) -> int | None:
        """What height and width must be multiples of, in pixels; None where any size will do, or if it is not known."""
        if self.denoiser is None or self._vae_config is None:
            return None
        return size_multiple(*self.denoiser, self._vae_config)

    def picture_size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """Size of the results of a call that is told none.

        Args:
            height: Height of a sample's picture, in pixels.
            width: Width of it.

        Returns:
            Height and width in pixels; None where they are not known.
        """
        factor, default = 1, None
        if self.denoiser is not None and self._vae_config is not None:
            scale = pixels_per_latent(self._vae_config)
            # an upscaler's latents are as large as the picture that it starts from
            factor = scale if "low_res_scheduler" in (self._index or {}) else 1
            size = latent_size(*self.denoiser)
            default = None if size is None else size * scale
        if self.template is not None and not self.template.takes_pictures:
            height, width, factor = default, default, 1
        return None if height is None else height * factor, None if width is None else width * factor

    @property
    def is_guided(self) -> bool | None:
        """Whether the denoiser gets a guidance batch; None where that is not known."""
        if self.template is None:
            return None
        if "true_cfg_scale" in self.template.defaults:
            # the prompt and the negative prompt go through the denoiser in calls of their own
            return False
        if self.denoiser is not None and embeds_guidance(*self.denoiser):
            return False
        scale = self.template.value("guidance_scale")
        return scale > 1 if isinstance(scale, (int, float)) else None

    def example_call(
        self, height: int, width: int, dtype: torch.dtype
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
        """The denoiser without weights and the arguments of one call.

        Args:
            height: Height of the results, in pixels.
            width: Width of the results, in pixels.
            dtype: Number format.

        Returns:
            Network, arguments and keyword arguments on the meta device; None where they are not known.
        """
        if self.denoiser is None or self._vae_config is None or self.is_guided is None:
            return None
        scale = pixels_per_latent(self._vae_config)
        batch = 2 if self.is_guided else 1
        kind, config = self.denoiser
        place = self._components.get("motion_adapter")
        if self.kind is AnimateDiffPipeline and kind == "UNet2DConditionModel" and isinstance(place, str):
            adapter = read_part_config("motion_adapter", place)
            if adapter is None:
                return None
            return motion_call(config, adapter, batch, self.num_frames, height // scale, width // scale, dtype)
        if self.kind is None or "motion_adapter" in init_parameters(self.kind):
            return None
        return example_call(kind, config, batch, height // scale, width // scale, dtype)

    @functools.cached_property
    def _index(self) -> dict[str, Any] | None:
        return read_index(self._pretrained)

    @functools.cached_property
    def _vae_config(self) -> dict[str, Any] | None:
        index = self._index
        return read_component_config(self._pretrained, "vae") if index is not None and "vae" in index else None

    def _template_of(self, kind: type[DiffusionPipeline]) -> CallTemplate:
        control = self._components.get("controlnet")
        number = len(control) if isinstance(control, list) else 1
        return CallTemplate(kind, self._given, number, self._has_ip_adapter)
