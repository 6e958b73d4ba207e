"""Pipelines of diffusers' own classes with tiny parts, float32 on the CPU: 8 x 8 latents and one layer a block.

Prompts come in as embeddings, so that no text encoder has to run; everything else is what a user has. `KINDS` are the
pipelines as they are built, `CASES` what users do to them.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from denoisers import GAIN, TEXT
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, MotionAdapter, UNet2DConditionModel
from tiny_changes import FIRST_AND_LATE, Settings, guidance_ends, ip_adapter, ip_adapter_of_flux, lora, scheduler_of
from torch import nn

FRAMES = 2
POOLED = 16
"""Width of the pooled text embeddings."""
SIZE = 8
"""Height and width of pictures and of latents: the tiny autoencoders scale nothing."""
WIDTHS = (32, 64)
"""Channels of the levels of a UNet."""
WORDS = 5

Draw = Callable[..., torch.Tensor]
"""Draws normal numbers of a shape."""


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline.

    Args:
        build: Makes the pipeline, with weights as they are drawn.
        inputs: Arguments of its call for a number of pictures.
        call: Further arguments of its call.
        steps: What `num_inference_steps` is.
        has_guidance_batch: Whether guidance doubles the batch of the denoiser's call, so that cfg 2 has halves.
    """

    build: Callable[[], DiffusionPipeline]
    inputs: Callable[[Draw, int], Settings]
    call: Settings = field(default_factory=dict)
    steps: int = 6
    has_guidance_batch: bool = True


@dataclass(frozen=True)
class Case:
    """A kind of pipeline, and what a user does to it.

    Args:
        kind: Name of the kind.
        change: Changes the pipeline; gives further arguments of its call.
        batch: Pictures at once.
    """

    kind: str
    change: Callable[[DiffusionPipeline], Settings] = lambda pipe: {}
    batch: int = 1


class Sample:
    """A pipeline with random weights, the same in each process, to be called as often as one likes.

    Args:
        name: Name of a kind or of a case.
    """

    def __init__(self, name: str) -> None:
        self.case = CASES.get(name) or Case(name)
        self.kind = KINDS[self.case.kind]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # pipelines complain of parts that are not those of a published checkpoint
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            self.pipe = self.kind.build()
            for module in _modules(self.pipe):
                react(module)
            self.more = self.case.change(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def denoiser(self) -> nn.Module:
        """The network that the pipeline calls once a step."""
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    def __call__(self, seed: int = 5) -> torch.Tensor:
        """The latents, or the picture where a pipeline gives nothing else; inputs and noise follow from the seed."""
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": self.kind.steps, "output_type": "latent", "guidance_scale": 2.0}
        settings |= self.kind.inputs(lambda *shape: torch.randn(shape, generator=generator), self.case.batch)
        settings |= self.kind.call | self.more
        with torch.random.fork_rng(devices=[]):
            # for schedulers whose noise the pipeline does not draw
            torch.manual_seed(seed)
            found = self.pipe(**settings, generator=generator, return_dict=False)[0]
        return torch.as_tensor(found).clone()


def _modules(pipe: DiffusionPipeline) -> Iterator[nn.Module]:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            yield part


@torch.no_grad()
def react(module: nn.Module) -> None:
    """Makes fresh weights react to their input: layers that start at zero, too."""
    for weight in module.parameters():
        if weight.ndim > 1:
            if not weight.any():
                nn.init.kaiming_uniform_(weight, a=5**0.5)
            weight.mul_(GAIN)
    module.requires_grad_(False).eval()


# -- parts ---------------------------------------------------------------------------------------------------------


def _autoencoder(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, **config)


def _unet(**config: Any) -> UNet2DConditionModel:
    blocks = {
        "block_out_channels": WIDTHS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    config = blocks | {"attention_head_dim": 8} | config
    return UNet2DConditionModel(sample_size=SIZE, layers_per_block=1, cross_attention_dim=TEXT, **config)


def _sd21_unet(**config: Any) -> UNet2DConditionModel:
    return _unet(attention_head_dim=(2, 4), use_linear_projection=True, **config)


def _sdxl_unet(**config: Any) -> UNet2DConditionModel:
    return _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        **config,
    )


def _controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16,))


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1)


def _euler() -> diffusers.EulerDiscreteScheduler:
    return diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")


# -- pipelines -----------------------------------------------------------------------------------------------------


def _stable_diffusion(
    kind: str = "StableDiffusionPipeline", unet: Callable[[], UNet2DConditionModel] = _unet, **parts: Any
) -> DiffusionPipeline:
    common = {"vae": _autoencoder(), "text_encoder": None, "tokenizer": None, "unet": unet(), "scheduler": _ddim()}
    if kind != "StableDiffusionUpscalePipeline":
        common |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, kind)(**common | parts)


def _sdxl(kind: str = "StableDiffusionXLPipeline", **parts: Any) -> DiffusionPipeline:
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    common = {"vae": _autoencoder(), "unet": _sdxl_unet(), "scheduler": _euler(), "add_watermarker": False}
    return getattr(diffusers, kind)(**common | encoders | parts)


def _with_controlnets(make: Callable[..., DiffusionPipeline], unet: Callable[[], Any], kind: str, count: int) -> Any:
    nets = [_controlnet(unet()) for _ in range(count)]
    return make(kind, controlnet=nets if count > 1 else nets[0])


def _animatediff() -> DiffusionPipeline:
    motion = MotionAdapter(
        motion_layers_per_block=1,
        block_out_channels=WIDTHS,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    return diffusers.AnimateDiffPipeline(
        vae=_autoencoder(), text_encoder=None, tokenizer=None, unet=_unet(), motion_adapter=motion, scheduler=_ddim()
    )


def _sd3() -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIZE,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoders = {f"{part}{at}": None for part in ("text_encoder", "tokenizer") for at in ("", "_2", "_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = _autoencoder(shift_factor=0.06)
    return diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **encoders)


def _flux(guidance_embeds: bool = True) -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    encoders = {f"{part}{at}": None for part in ("text_encoder", "tokenizer") for at in ("", "_2")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = _autoencoder(shift_factor=0.06)
    return diffusers.FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **encoders)


def _dit() -> DiffusionPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=SIZE, in_channels=4, out_channels=8, num_layers=4, attention_head_dim=8, num_attention_heads=4
    )
    return diffusers.DiTPipeline(transformer, _autoencoder(), _ddim())


# -- inputs --------------------------------------------------------------------------------------------------------


def _text(draw: Draw, batch: int) -> Settings:
    return {"prompt_embeds": draw(batch, WORDS, TEXT), "negative_prompt_embeds": draw(batch, WORDS, TEXT)}


def _sized(draw: Draw, batch: int) -> Settings:
    return {"height": SIZE, "width": SIZE, **_text(draw, batch)}


def _pooled(draw: Draw, batch: int) -> Settings:
    pooled = {"pooled_prompt_embeds": draw(batch, POOLED), "negative_pooled_prompt_embeds": draw(batch, POOLED)}
    return _sized(draw, batch) | pooled


def _positive(draw: Draw, batch: int) -> Settings:
    return {name: value for name, value in _pooled(draw, batch).items() if not name.startswith("negative")}


def _picture(draw: Draw, batch: int) -> torch.Tensor:
    return draw(batch, 3, SIZE, SIZE).sigmoid()


def _pictured(draw: Draw, batch: int) -> Settings:
    return {"image": _picture(draw, batch), **_text(draw, batch)}


def _controlled(text: Callable[[Draw, int], Settings], count: int = 1) -> Callable[[Draw, int], Settings]:
    def inputs(draw: Draw, batch: int) -> Settings:
        pictures = [_picture(draw, batch) for _ in range(count)]
        return {"image": pictures if count > 1 else pictures[0], **text(draw, batch)}

    return inputs


def _inpainted(draw: Draw, batch: int) -> Settings:
    mask = torch.zeros(batch, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    return {"image": _picture(draw, batch), "mask_image": mask, **_pooled(draw, batch)}


def _labels(draw: Draw, batch: int) -> Settings:
    return {"class_labels": [207, 360, 12][:batch], "output_type": "pt"}


def _filmed(draw: Draw, batch: int) -> Settings:
    return {"num_frames": FRAMES, **_sized(draw, batch)}


KINDS: dict[str, Kind] = {
    "sd15": Kind(_stable_diffusion, _sized),
    "sd21": Kind(lambda: _stable_diffusion(unet=_sd21_unet), _sized),
    "img2img": Kind(
        lambda: _stable_diffusion("StableDiffusionImg2ImgPipeline"), _pictured, {"strength": 0.6}, steps=10
    ),
    "upscale": Kind(
        lambda: _stable_diffusion(
            "StableDiffusionUpscalePipeline",
            lambda: _sd21_unet(in_channels=7, num_class_embeds=40),
            vae=_autoencoder(scaling_factor=0.08333),
            low_res_scheduler=diffusers.DDPMScheduler(),
        ),
        _pictured,
    ),
    "controlnet": Kind(
        lambda: _with_controlnets(_stable_diffusion, _unet, "StableDiffusionControlNetPipeline", 1), _controlled(_text)
    ),
    "controlnets": Kind(
        lambda: _with_controlnets(_stable_diffusion, _unet, "StableDiffusionControlNetPipeline", 2),
        _controlled(_text, 2),
        {"controlnet_conditioning_scale": [1.0, 0.6], "control_guidance_end": [0.5, 1.0]},
    ),
    "sdxl": Kind(_sdxl, _pooled),
    "sdxl_inpaint": Kind(
        lambda: _sdxl("StableDiffusionXLInpaintPipeline", unet=_sdxl_unet(in_channels=9)),
        _inpainted,
        {"strength": 0.8},
        steps=8,
    ),
    "sdxl_controlnet": Kind(
        lambda: _with_controlnets(_sdxl, _sdxl_unet, "StableDiffusionXLControlNetPipeline", 1), _controlled(_pooled)
    ),
    "sdxl_controlnets": Kind(
        lambda: _with_controlnets(_sdxl, _sdxl_unet, "StableDiffusionXLControlNetPipeline", 2),
        _controlled(_pooled, 2),
        {"controlnet_conditioning_scale": [1.0, 0.6]},
    ),
    "sd3": Kind(_sd3, _pooled),
    "flux": Kind(_flux, _positive, has_guidance_batch=False),
    "flux_true_cfg": Kind(lambda: _flux(False), _pooled, {"true_cfg_scale": 3.0}, has_guidance_batch=False),
    "dit": Kind(_dit, _labels),
    "animatediff": Kind(_animatediff, _filmed),
}

CASES: dict[str, Case] = {
    "sd15_pndm": Case("sd15", scheduler_of("PNDMScheduler", skip_prk_steps=True)),
    "sd15_heun": Case("sd15", scheduler_of("HeunDiscreteScheduler")),
    "img2img_pndm": Case("img2img", scheduler_of("PNDMScheduler", skip_prk_steps=True)),
    "img2img_heun": Case("img2img", scheduler_of("HeunDiscreteScheduler")),
    "sd15_guidance_ends": Case("sd15", guidance_ends("prompt_embeds")),
    "sdxl_guidance_ends": Case("sdxl", guidance_ends("prompt_embeds", "add_text_embeds", "add_time_ids")),
    "sd3_guidance_ends": Case("sd3", guidance_ends("prompt_embeds", "pooled_prompt_embeds")),
    "sd3_skips_layers": Case("sd3", lambda pipe: dict(FIRST_AND_LATE)),
    "controlnet_guesses": Case("controlnet", lambda pipe: {"guess_mode": True}),
    "sd15_ip_adapter": Case("sd15", ip_adapter),
    "sdxl_ip_adapter": Case("sdxl", ip_adapter),
    "flux_ip_adapter": Case("flux_true_cfg", ip_adapter_of_flux),
}
CASES |= {f"{kind}_of_three": Case(kind, batch=3) for kind in ("sd15", "flux_true_cfg", "dit", "animatediff")}
if importlib.util.find_spec("peft") is not None:
    CASES |= {f"{kind}_lora": Case(kind, lora) for kind in ("sd15", "flux")}
