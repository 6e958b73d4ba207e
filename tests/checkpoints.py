"""A checkpoint that is written to disk, of the real classes and as small as the tests can do with.

The models that ship with the package are larger, and trained: tests that run a pipeline many times take this one.
"""

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from asyncdiff_pl.models.loading import quiet_libraries
from asyncdiff_pl.models.random_weights import fill_random

WIDTH = 32


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
        "image_encoder": CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=WIDTH,
                hidden_act="gelu",
            )
        ),
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
