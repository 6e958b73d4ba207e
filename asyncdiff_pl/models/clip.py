"""CLIP for scores: from the hub, a folder, or the tiny one that ships with the package."""

from __future__ import annotations

import torch
from transformers import CLIPModel, CLIPProcessor

from asyncdiff_pl.models.embedded import EMBEDDED_CLIP, is_trained
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import build_random_model
from asyncdiff_pl.models.sources import find_folder, first_reason, has_weights, read_json, why_unreachable


def check_clip(name: str) -> None:
    """Checks what can be known of a CLIP model without loading or fetching anything.

    Args:
        name: A hub name, a local folder, or `tiny-clip`.

    Raises:
        ValueError: If the folder is missing or holds no CLIP model.
    """
    folder = find_folder(name, EMBEDDED_CLIP)
    if folder is None:
        return
    kind = read_json(folder, "config.json", "a CLIP model's folder").get("model_type")
    if kind != "clip":
        raise ValueError(f"The folder {name} holds a model of type {kind}; give one of type clip.")
    if name not in EMBEDDED_CLIP and not has_weights(folder):
        raise ValueError(f"The folder {name} has no weight files; add them, or give a hub name.")


def is_random(name: str) -> bool:
    """Whether the model's weights are random, so that its scores mean nothing."""
    return name in EMBEDDED_CLIP and not is_trained(name)


def load_clip(name: str, device: torch.device | str = "cpu") -> tuple[CLIPModel, CLIPProcessor]:
    """Loads a CLIP model and what prepares its inputs.

    The processor pads the texts of a batch and cuts those that are longer than the model's context, unless told
    otherwise in its call.

    Args:
        name: A hub name, a local folder, or `tiny-clip`.
        device: Where the model goes.

    Returns:
        The model in float32, in eval mode and without gradients, and the processor.

    Raises:
        ValueError: If the model cannot be found, fetched or read.
    """
    check_clip(name)
    folder = find_folder(name, EMBEDDED_CLIP)
    # one question to the hub: transformers would ask for each file, and wait longer each time that it fails
    unreachable = why_unreachable(name) if folder is None else None
    with quiet_libraries():
        try:
            processor = CLIPProcessor.from_pretrained(folder or name, local_files_only=unreachable is not None)
            if is_random(name):
                assert folder is not None
                model = build_random_model(CLIPModel, folder, torch.float32, seed_name="clip")
            else:
                model = CLIPModel.from_pretrained(
                    folder or name, dtype=torch.float32, local_files_only=unreachable is not None
                )
        except (OSError, ValueError) as error:
            what = "could not be loaded" if unreachable is None else "is not in the cache and could not be fetched"
            raise ValueError(
                f"The CLIP model {name} {what} ({unreachable or first_reason(error)}); give a local folder of a CLIP "
                f"model, or {', '.join(EMBEDDED_CLIP)} for a stand-in."
            ) from error
    assert isinstance(model, CLIPModel)
    context = model.config.text_config.max_position_embeddings
    processor.text_kwargs = {"padding": True, "truncation": True, "max_length": context}
    return model.requires_grad_(False).eval().to(device), processor
