import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.models.random_weights import build_random_model, build_random_pipeline, component_class
from asyncdiff_pl.models.sources import ARCHITECTURES

PARAMETERS = {
    "sd15/unet": 859_520_964,
    "sd21/unet": 865_910_724,
    "sd21/text_encoder": 340_387_840,
    "sdxl/unet": 2_567_463_684,
    "sdxl/text_encoder": 123_060_480,
    "sdxl/text_encoder_2": 694_659_840,
    "sdxl/vae": 83_653_863,
    "sdxl-inpainting/unet": 2_567_478_084,
    "sd3-medium/transformer": 2_028_328_000,
    "sd3-medium/vae": 83_819_683,
    "x4-upscaler/unet": 473_398_020,
    "x4-upscaler/vae": 55_325_927,
    # 675 million as published, and 27 more embeddings of times and classes: diffusers has one in each block
    "dit-xl-2-256/transformer": 749_826_464,
    "flux-dev/transformer": 11_901_408_320,
    "controlnet-sdxl-canny": 1_251_014_160,
    "motion-adapter-v1-5-2": 453_209_280,
    "motion-adapter-v1-5-3": 417_137_600,
}
"""Parameters of the published networks."""

PUBLISHED_DIT = 675_129_632

SMALL_TEXT = {"num_hidden_layers": 1}
SMALL_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
SMALL = {"block_out_channels": [32] * 4, "layers_per_block": 1, "attention_head_dim": 8}
SMALL_XL = {"block_out_channels": [32] * 3, "layers_per_block": 1, "attention_head_dim": 8}
SMALL_XL |= {"transformer_layers_per_block": 1}
SMALL_SD = {"unet": SMALL, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT}
SMALL_SDXL = {"unet": SMALL_XL, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT, "text_encoder_2": SMALL_TEXT}
SMALLER = {
    "sd15": SMALL_SD,
    "sdxl": SMALL_SDXL,
    "sdxl-inpainting": SMALL_SDXL,
    "sd3-medium": {
        "transformer": {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 128},
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "text_encoder_2": SMALL_TEXT,
    },
    "x4-upscaler": SMALL_SD | {"vae": {"block_out_channels": [32] * 3, "layers_per_block": 1}},
    "dit-xl-2-256": {"transformer": {"num_layers": 1, "num_attention_heads": 1, "sample_size": 8}, "vae": SMALL_VAE},
    "flux-dev": {
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "text_encoder_2": {"num_layers": 1, "d_ff": 64, "num_heads": 2},
    },
}
"""What makes each pipeline small; widths that its parts must share, and all else, stay as published."""

PICTURE = Image.new("RGB", (64, 64), "red")
PROMPT = {"prompt": "A dog, 2 m high!", "height": 64, "width": 64}


def configuration(folder):
    return json.loads((folder / "config.json").read_text())


def network_class(folder):
    index = folder.parent / "model_index.json"
    if index.exists():
        return component_class(*json.loads(index.read_text())[folder.name])
    return component_class("diffusers", configuration(folder)["_class_name"])


def on_meta(folder):
    kind = network_class(folder)
    config = configuration(folder)
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))


@pytest.mark.parametrize("place", PARAMETERS)
def test_networks_have_the_published_number_of_parameters(place):
    assert sum(parameter.numel() for parameter in on_meta(MODELS_FOLDER / place).parameters()) == PARAMETERS[place]


def test_the_published_dit_has_one_embedding():
    network = on_meta(MODELS_FOLDER / "dit-xl-2-256" / "transformer")
    embeddings = [sum(p.numel() for p in block.norm1.emb.parameters()) for block in network.transformer_blocks]
    # the published one keeps its fixed positions among its parameters
    positions = 256 * 1152
    assert PARAMETERS["dit-xl-2-256/transformer"] - sum(embeddings[1:]) + positions == PUBLISHED_DIT


def test_every_architecture_says_what_it_is():
    folders = {name for name, _ in ARCHITECTURES.values()}
    for name in folders - {"svd-xt"}:
        hub_names = [hub for hub, (folder, _) in ARCHITECTURES.items() if folder == name]
        text = (MODELS_FOLDER / name / "README.md").read_text()
        assert any(hub in text for hub in hub_names), name
    size = sum(path.stat().st_size for name in folders for path in (MODELS_FOLDER / name).rglob("*") if path.is_file())
    assert size < 100_000


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("sd15", PROMPT, (64, 64)),
        ("sdxl-inpainting", PROMPT | {"image": PICTURE, "mask_image": PICTURE, "strength": 1.0}, (64, 64)),
        ("sd3-medium", PROMPT, (64, 64)),
        ("x4-upscaler", {"prompt": "a dog", "image": PICTURE}, (256, 256)),
        ("dit-xl-2-256", {"class_labels": [7]}, (64, 64)),
        ("flux-dev", PROMPT, (64, 64)),
    ],
)
def test_pipelines_run_with_the_files_of_the_package(name, arguments, size):
    pipeline = build_random_pipeline(DiffusionPipeline, MODELS_FOLDER / name, torch.float32, SMALLER[name])
    assert run(pipeline, arguments, steps=1)[0].size == size


@pytest.mark.parametrize(
    ("base", "kind", "part", "folder", "smaller", "arguments"),
    [
        (
            *("sdxl", "StableDiffusionXLControlNetPipeline", "controlnet", "controlnet-sdxl-canny"),
            *(SMALL_XL, PROMPT | {"image": PICTURE}),
        ),
        (
            *("sd15", "AnimateDiffPipeline", "motion_adapter", "motion-adapter-v1-5-3"),
            *({"block_out_channels": [32] * 4, "motion_layers_per_block": 1}, PROMPT | {"num_frames": 3}),
        ),
    ],
)
def test_pipelines_of_an_architecture_and_a_part_from_elsewhere(base, kind, part, folder, smaller, arguments):
    extra = build_random_model(network_class(MODELS_FOLDER / folder), MODELS_FOLDER / folder, torch.float32, smaller)
    pipeline = build_random_pipeline(
        getattr(diffusers, kind), MODELS_FOLDER / base, torch.float32, SMALLER[base], {part: extra}
    )
    assert type(pipeline).__name__ == kind
    assert run(pipeline, arguments, steps=1)[0].size == (64, 64)


def run(pipeline, arguments, steps):
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(**arguments, num_inference_steps=steps, generator=torch.Generator().manual_seed(1))
    return output.images if hasattr(output, "images") else output.frames[0]
