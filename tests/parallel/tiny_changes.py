"""What users do to a pipeline before they call it: schedulers, guidance that ends, adapters."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from denoisers import TEXT
from diffusers import DiffusionPipeline
from torch import nn

IMAGE = 12
"""Width of the image embeddings of IP-Adapters."""

Settings = dict[str, Any]
"""Keyword arguments of a pipeline's call."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def scheduler_of(kind: str, **config: Any) -> Callable[[DiffusionPipeline], Settings]:
    def change(pipe: DiffusionPipeline) -> Settings:
        pipe.scheduler = getattr(diffusers, kind)(beta_schedule="scaled_linear", steps_offset=1, **config)
        return {}

    return change


def guidance_ends(*embeds: str) -> Callable[[DiffusionPipeline], Settings]:
    """After half of the steps, as the documentation of diffusers shows it."""

    def end(pipe: DiffusionPipeline, step: int, timestep: Any, given: Settings) -> Settings:
        if step == 2:
            pipe._guidance_scale = 0.0
            return {name: value.chunk(2)[-1] for name, value in given.items()}
        return given

    return lambda pipe: {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": list(embeds)}


def _projection(generator: torch.Generator) -> dict[str, torch.Tensor]:
    weight = torch.randn(4 * TEXT, IMAGE, generator=generator) / IMAGE**0.5
    norm = {"norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT)}
    return {"proj.weight": weight, "proj.bias": torch.zeros(4 * TEXT), **norm}


def ip_adapter(pipe: DiffusionPipeline) -> Settings:
    """Of a UNet: the attentions to the text get keys and values of a picture."""
    generator, weights = _generator(), {}
    attentions = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for at, name in enumerate(attentions):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):
            weights[f"{2 * at + 1}.to_{part}_ip.weight"] = torch.randn(width, TEXT, generator=generator) / TEXT**0.5
    state = {"image_proj": _projection(generator), "ip_adapter": weights}
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8)
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, IMAGE, generator=generator)]}


def ip_adapter_of_flux(pipe: DiffusionPipeline) -> Settings:
    """Of a transformer: it comes among the arguments of the attention layers."""
    generator, weights = _generator(), {}
    width = pipe.transformer.inner_dim
    for at in range(len(pipe.transformer.transformer_blocks)):
        for part in ("k", "v"):
            weights[f"{at}.to_{part}_ip.weight"] = torch.randn(width, TEXT, generator=generator) / TEXT**0.5
            weights[f"{at}.to_{part}_ip.bias"] = torch.zeros(width)
    pipe.transformer._load_ip_adapter_weights([{"image_proj": _projection(generator), "ip_adapter": weights}])
    embeds = [torch.randn(1, 1, IMAGE, generator=generator) for _ in range(2)]
    return {"ip_adapter_image_embeds": embeds[:1], "negative_ip_adapter_image_embeds": embeds[1:]}


def lora(pipe: DiffusionPipeline) -> Settings:
    generator, weights = _generator(), {}
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    for name, module in getattr(pipe, part).named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("to_q", "to_v", "proj_in"):
            for kind, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                weights[f"{part}.{name}.lora_{kind}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    pipe.load_lora_weights(weights)
    return {}


FIRST_AND_LATE = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
