"""A pipeline with a checkpoint's architecture and random weights: for latency, dry runs and tests.

Only the small configuration files of the checkpoint are read. The weights are pieces of one block of normal numbers,
each parameter's piece and scale given by its name and its shape, so that all ranks and all runs hold the same ones and
full-size models are filled at the speed of a copy.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from asyncdiff_pl.models.embedded import MODELS_FOLDER, RECIPE

BLOCK_SIZE = 1_048_573
"""Numbers in the block; a prime, so that the rows of a large matrix do not repeat."""


def build_random_pipeline(
    pipeline_class: type[DiffusionPipeline],
    folder: Path,
    dtype: torch.dtype,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    components: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Builds the pipeline of a checkpoint folder without its weights, on the CPU.

    The folders of the package name in `components.json` the small tokenizers that stand in for the published ones.

    Args:
        pipeline_class: Which pipeline; `DiffusionPipeline` lets the folder's model_index.json say.
        folder: Folder with model_index.json and each component's configuration files.
        dtype: Number format of the weights.
        overrides: Entries of components' configurations that differ from the files, by component.
        components: Parts that are built already, by name: they take the place of the folder's own, or come on top.

    Returns:
        The pipeline; its tokenizers, processors and scheduler are those of the folder.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8")) if (folder / RECIPE).is_file() else {}
    parts = dict(components or {})
    for name, entry in index.items():
        if not isinstance(entry, list) or name in parts:
            continue
        if entry[0] is None:
            parts[name] = None
            continue
        component = component_class(*entry)
        if issubclass(component, nn.Module):
            changes = (overrides or {}).get(name, {})
            parts[name] = build_random_model(component, folder / name, dtype, changes, seed_name=name)
        else:
            shared = recipe.get(name, "").partition("/")[0]
            source = MODELS_FOLDER / "components" / shared if shared else folder / name
            parts[name] = component.from_pretrained(source)
    # AnimateDiff's makes a network of two others, whose weights it takes: those that it starts with need no drawing
    with torch.random.fork_rng(devices=[]), no_init_weights():
        return pipeline_class.from_pretrained(folder, dtype=dtype, **parts)


def build_random_model(
    model_class: type[nn.Module],
    folder: Path,
    dtype: torch.dtype,
    overrides: Mapping[str, Any] | None = None,
    seed_name: str = "",
) -> nn.Module:
    """Builds one diffusers or transformers model from its configuration, with random weights, on the CPU.

    Args:
        model_class: Class of the model.
        folder: Folder with its config.json.
        dtype: Number format of the weights.
        overrides: Entries of the configuration that differ from the file.
        seed_name: Goes into every parameter's weights, to tell models of one pipeline apart.

    Returns:
        The model in eval mode.
    """
    # constructors draw some parameters themselves: from a state that is the same everywhere and is put back
    with torch.random.fork_rng(devices=[]), _default_dtype(dtype), no_init_weights():
        torch.manual_seed(0)
        model = _construct(model_class, folder, overrides or {})
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    for parameter in model.parameters():
        # some constructors name a number format; buffers keep theirs, as they do when weights are loaded
        parameter.data = parameter.data.to(dtype)
    fill_random(model, seed_name)
    return model.eval()


@torch.no_grad()
def fill_random(model: nn.Module, seed_name: str = "") -> None:
    """Gives every parameter random weights that keep activations near unit scale.

    Matrices and kernels have variance 1 / fan-in and embeddings 1; norms start as the identity and biases at 0. Single
    numbers (temperatures, mixing factors) stay as the constructor set them.

    Args:
        model: Changed in place; parameters of any dtype, on any device.
        seed_name: Goes into the weights beside the parameters' names.
    """
    block = torch.randn(BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if parameter.numel() == 1:
            continue
        if parameter.ndim == 1 and kind.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1 and kind == "weight":
            parameter.fill_(1.0)
        else:
            one_to_one = parameter.ndim == 1 or isinstance(model.get_submodule(owner), nn.Embedding)
            fan_in = 1 if one_to_one else parameter[0].numel()
            start = int.from_bytes(hashlib.sha256(f"{seed_name}.{name}".encode()).digest()[:8], "big") % BLOCK_SIZE
            _tile(parameter.view(-1), block.roll(-start).mul_(fan_in**-0.5).to(parameter.dtype))


def component_class(library: str, name: str) -> type[Any]:
    """The class that an entry `[library, name]` of a model_index.json names."""
    # some components live beside their pipeline, `[stable_diffusion, StableDiffusionSafetyChecker]` say
    module = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    return getattr(module, name)


def _construct(model_class: type[nn.Module], folder: Path, overrides: Mapping[str, Any]) -> nn.Module:
    if issubclass(model_class, PreTrainedModel):
        return model_class(model_class.config_class.from_pretrained(folder, **overrides))
    assert issubclass(model_class, ModelMixin) and issubclass(model_class, ConfigMixin)
    return model_class.from_config({**model_class.load_config(folder), **overrides})


def _tile(target: torch.Tensor, block: torch.Tensor) -> None:
    whole = target.numel() // len(block) * len(block)
    target[:whole].view(-1, len(block)).copy_(block)
    target[whole:].copy_(block[: target.numel() - whole])


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
