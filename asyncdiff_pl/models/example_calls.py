"""Denoisers on the meta device and the arguments of one call, as diffusers' pipelines make it: to foresee costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from torch import nn

TEXT_LENGTH = 77
"""Tokens of CLIP's texts."""

T5_LENGTH = {"SD3Transformer2DModel": 256, "FluxTransformer2DModel": 512}
"""Tokens of T5's texts, by denoiser: the pipelines' defaults."""

Config = Mapping[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def pixels_per_latent(vae_config: Config) -> int:
    """How many times larger a picture is than its latents: each level of the autoencoder but the last halves it."""
    return 2 ** (len(vae_config.get("block_out_channels", (0,))) - 1)


def latent_size(denoiser: str, config: Config) -> int | None:
    """Height and width of the latents that a pipeline makes if it is told none; None if they are not known."""
    if denoiser == "FluxTransformer2DModel":
        return 128
    size = config.get("sample_size")
    return size if isinstance(size, int) else None


def size_multiple(denoiser: str, config: Config, vae_config: Config) -> int | None:
    """What height and width must be multiples of, in pixels; None where any size will do, or if it is not known."""
    scale = pixels_per_latent(vae_config)
    if denoiser == "UNet2DConditionModel":
        # on the way back up it brings odd sizes to those of the skip connections
        return scale
    if denoiser == "SD3Transformer2DModel":
        return scale * config["patch_size"]
    return 2 * scale if denoiser == "FluxTransformer2DModel" else None


def embeds_guidance(denoiser: str, config: Config) -> bool:
    """Whether a distilled denoiser takes the guidance scale as an input, and so no guidance batch."""
    return denoiser == "FluxTransformer2DModel" or config.get("time_cond_proj_dim") is not None


def example_call(
    denoiser: str, config: Config, batch: int, height: int, width: int, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """A denoiser without weights and the arguments of one call.

    Args:
        denoiser: Its class name.
        config: Its configuration.
        batch: Size of the batch, guidance included.
        height: Height of the latents.
        width: Width of the latents.
        dtype: Number format of weights and activations.

    Returns:
        The denoiser on the meta device, positional and keyword arguments; None for kinds that are not known here.
    """
    if denoiser not in CALLS:
        return None
    with torch.device("meta"):
        twin = getattr(diffusers, denoiser).from_config(dict(config))
        nn.Module.to(twin.requires_grad_(False).eval(), "meta", dtype)
        args, kwargs = CALLS[denoiser](twin.config, batch, height, width, dtype)
    return twin, args, kwargs


def motion_call(
    unet: Config, adapter: Config, batch: int, num_frames: int, height: int, width: int, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """AnimateDiff's denoiser without weights and the arguments of one call.

    Args:
        unet: Configuration of the UNet for pictures.
        adapter: Configuration of the motion adapter.
        batch: Size of the batch, guidance included.
        num_frames: Frames of a video.
        height: Height of the latents.
        width: Width of the latents.
        dtype: Number format of weights and activations.

    Returns:
        The denoiser on the meta device, positional and keyword arguments.
    """
    with torch.device("meta"):
        pictures = diffusers.UNet2DConditionModel.from_config(dict(unet))
        motion = diffusers.MotionAdapter.from_config(dict(adapter))
        twin = diffusers.UNetMotionModel.from_unet2d(pictures, motion, load_weights=False)
        nn.Module.to(twin.requires_grad_(False).eval(), "meta", dtype)
        latents = torch.empty(batch, twin.config.in_channels, num_frames, height, width, dtype=dtype)
        texts = torch.empty(batch * num_frames, TEXT_LENGTH, twin.config.cross_attention_dim, dtype=dtype)
    kwargs = {"encoder_hidden_states": texts, "cross_attention_kwargs": None, "added_cond_kwargs": None}
    return twin, (latents, torch.empty((), device="meta")), kwargs


def _unet(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Call:
    latents = torch.empty(batch, config.in_channels, height, width, dtype=dtype)
    texts = torch.empty(batch, TEXT_LENGTH, config.cross_attention_dim, dtype=dtype)
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        # the x4 upscaler's noise level
        noise_level = torch.empty(batch, dtype=torch.long)
        kwargs = {"encoder_hidden_states": texts, "cross_attention_kwargs": None, "class_labels": noise_level}
        return (latents, torch.empty(())), kwargs | {"return_dict": False}
    added = None
    if config.addition_embed_type == "text_time":
        numbers = 6
        pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        added = {
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, numbers, dtype=dtype),
        }
    kwargs = {"encoder_hidden_states": texts, "timestep_cond": None, "cross_attention_kwargs": None}
    return (latents, torch.empty(())), kwargs | {"added_cond_kwargs": added, "return_dict": False}


def _sd3(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Call:
    length = TEXT_LENGTH + T5_LENGTH["SD3Transformer2DModel"]
    return (), {
        "hidden_states": torch.empty(batch, config.in_channels, height, width, dtype=dtype),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, length, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _flux(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Call:
    length = T5_LENGTH["FluxTransformer2DModel"]
    # 2 x 2 latents make a token
    tokens = (height // 2) * (width // 2)
    return (), {
        "hidden_states": torch.empty(batch, tokens, config.in_channels, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "guidance": torch.empty(batch) if config.guidance_embeds else None,
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, length, config.joint_attention_dim, dtype=dtype),
        "txt_ids": torch.empty(length, 3, dtype=dtype),
        "img_ids": torch.empty(tokens, 3, dtype=dtype),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _dit(config: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> Call:
    latents = torch.empty(batch, config.in_channels, height, width, dtype=dtype)
    steps = torch.empty(batch, dtype=torch.long)
    return (latents,), {"timestep": steps, "class_labels": torch.empty(batch, dtype=torch.long)}


CALLS: dict[str, Callable[..., Call]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "DiTTransformer2DModel": _dit,
    # what the published checkpoints of DiT call it
    "Transformer2DModel": _dit,
}
"""How a pipeline calls each kind of denoiser."""
