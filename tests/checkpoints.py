"""A checkpoint that is written to disk, of the real classes and as small as the tests can do with.

The models that ship with the package are larger, and trained: tests that run a pipeline many times take this one.
"""

import json

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    MotionAdapter,
    SD3Transformer2DModel,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import fill_random

WIDTH = 32
TWO_LEVELS = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
"""A UNet that the tests can afford; ControlNets and motion adapters must match it."""


def save_small_svd(folder):
    """Stable Video Diffusion with all kinds of blocks, sizes in multiples of 64 pixels, random weights in float32."""
    parts = {
        "unet": UNetSpatioTemporalConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 64, 64),
            num_attention_heads=(2, 4, 4, 4),
            cross_attention_dim=WIDTH,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            num_frames=8,
        ),
        "vae": AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=128,
        ),
        "image_encoder": small_image_encoder(),
    }
    for name, part in parts.items():
        fill_random(part.eval(), name)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
    )
    with quiet_libraries():
        processor = CLIPImageProcessor()
        StableVideoDiffusionPipeline(**parts, scheduler=scheduler, feature_extractor=processor).save_pretrained(folder)
    return folder


def save_small_sd(folder, pipeline="StableDiffusionPipeline", **unet):
    """Stable Diffusion; pictures of 64x64 pixels unless told otherwise."""
    parts = {
        "unet": small_unet(**unet),
        "vae": small_vae(),
        "text_encoder": small_text_encoder(),
    }
    return save(folder, pipeline, parts, ddim(), tokenizer=clip_tokenizer(), **unchecked())


def save_small_sd_inpainting(folder):
    """Stable Diffusion whose denoiser sees the picture and the mask."""
    return save_small_sd(folder, "StableDiffusionInpaintPipeline", in_channels=9)


def save_small_upscaler(folder):
    """Stable Diffusion's x4 upscaler."""
    parts = {
        "unet": small_unet(in_channels=7, num_class_embeds=1000),
        "vae": small_vae(levels=3, force_upcast=False),
        "text_encoder": small_text_encoder(),
    }
    more = {"tokenizer": clip_tokenizer(), "low_res_scheduler": DDPMScheduler(beta_schedule="scaled_linear")}
    return save(folder, "StableDiffusionUpscalePipeline", parts, ddim(prediction_type="v_prediction"), **more)


def save_small_sdxl(folder, pipeline="StableDiffusionXLPipeline", **unet):
    """SDXL: two text encoders, size conditions, several transformer blocks in a row."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
        "cross_attention_dim": 2 * WIDTH,
        "transformer_layers_per_block": 2,
    }
    parts = {
        "unet": small_unet(**added, **unet),
        "vae": small_vae(),
        "text_encoder": small_text_encoder(),
        "text_encoder_2": small_text_encoder(CLIPTextModelWithProjection),
    }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    return save(folder, pipeline, parts, ddim(), **tokenizers)


def save_small_sd3(folder):
    """Stable Diffusion 3 with all three text encoders."""
    parts = {
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        "vae": small_vae(shift_factor=0.06),
        "text_encoder": small_text_encoder(CLIPTextModelWithProjection),
        "text_encoder_2": small_text_encoder(CLIPTextModelWithProjection),
        "text_encoder_3": small_t5(2 * WIDTH),
    }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    return save(folder, "StableDiffusion3Pipeline", parts, FlowMatchEulerDiscreteScheduler(shift=3.0), **tokenizers)


def save_small_flux(folder):
    """FLUX, with a guidance embedding as FLUX-dev has it."""
    parts = {
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": small_vae(shift_factor=0.06),
        "text_encoder": small_text_encoder(),
        "text_encoder_2": small_t5(WIDTH),
    }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return save(folder, "FluxPipeline", parts, scheduler, **tokenizers)


def save_small_dit(folder):
    """DiT with three classes that have names; pictures of 64x64 pixels."""
    parts = {
        "transformer": DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            # the pipeline's number for no class
            num_embeds_ada_norm=1000,
        ),
        "vae": small_vae(),
    }
    save(folder, "DiTPipeline", parts, ddim())
    # as the published ones have it; diffusers reads it and does not write it
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "white shark"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_small_controlnet(folder, seed_name="controlnet", **config):
    """A ControlNet that matches `save_small_sd`; its outputs are not zero, as a trained one's are not."""
    return save_part(folder, ControlNetModel(**TWO_LEVELS, **config), seed_name)


def save_small_motion_adapter(folder):
    """A motion adapter that matches `save_small_sd`."""
    adapter = MotionAdapter(
        block_out_channels=TWO_LEVELS["block_out_channels"],
        motion_layers_per_block=TWO_LEVELS["layers_per_block"],
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    return save_part(folder, adapter, "motion_adapter")


def save_small_vae(folder):
    """Another autoencoder than the one that the pipelines have."""
    return save_part(folder, small_vae(), "another")


def save_small_lora(folder, unet=None, name="pytorch_lora_weights.safetensors"):
    """A LoRA of the attention projections of a UNet, `save_small_sd`'s by default."""
    tensors = {}
    for path, layer in (unet or small_unet()).named_modules():
        if path.endswith(("to_q", "to_v")):
            generator = torch.Generator().manual_seed(len(tensors))
            tensors[f"unet.{path}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=generator)
            tensors[f"unet.{path}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) / 30
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def save_small_ip_adapter(folder):
    """An IP-Adapter for `save_small_sd`, with its image encoder, in the folders of the published ones."""
    tokens = 4
    projected = {
        "image_proj.proj.weight": (tokens * WIDTH, WIDTH),
        "image_proj.proj.bias": (tokens * WIDTH,),
        "image_proj.norm.weight": (WIDTH,),
        "image_proj.norm.bias": (WIDTH,),
    }
    for number, name in enumerate(n for n in small_unet().attn_processors if n.endswith("attn2.processor")):
        for kind in ("k", "v"):
            projected[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = (32, WIDTH)
        assert "block" in name
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in projected.items()}
    (folder / "models").mkdir(parents=True)
    save_file(tensors, folder / "models" / "ip-adapter.safetensors")
    save_part(folder / "models" / "image_encoder", small_image_encoder(), "image_encoder")
    return folder


# -- parts ------------------------------------------------------------------------------------------------------------


def small_unet(**config):
    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**{"sample_size": 8, **TWO_LEVELS, **up, **config})


def small_vae(levels=4, **config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(block_out_channels=(32,) * levels, **blocks, layers_per_block=1, sample_size=64, **config)


def small_text_encoder(kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=1024,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            bos_token_id=1022,
            eos_token_id=1023,
            pad_token_id=1023,
        )
    )


def small_image_encoder():
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            hidden_act="gelu",
        )
    )


def small_t5(width):
    config = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=1024, **config))


def clip_tokenizer():
    return CLIPTokenizer.from_pretrained(MODELS_FOLDER / "components" / "scene-clip")


def t5_tokenizer():
    return T5TokenizerFast.from_pretrained(MODELS_FOLDER / "components" / "small-t5")


def ddim(**config):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config,
    )


def unchecked():
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def save_part(folder, part, seed_name):
    fill_random(part.eval(), seed_name)
    part.save_pretrained(folder)
    return folder


def save(folder, pipeline, parts, scheduler, **more):
    for name, part in parts.items():
        fill_random(part.eval(), name)
    with quiet_libraries():
        getattr(diffusers, pipeline)(**parts, scheduler=scheduler, **more).save_pretrained(folder)
    return folder
