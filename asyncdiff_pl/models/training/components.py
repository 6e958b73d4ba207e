"""The networks that training builds anew or takes as they are, from folders as exported or from the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, ConfigMixin, SchedulerMixin
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncdiff_pl.models.embedded import MODELS_FOLDER, find_component
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import build_random_model
from asyncdiff_pl.models.schedulers import find_scheduler
from asyncdiff_pl.models.sources import has_weights, read_json

Network = TypeVar("Network", bound=nn.Module)


def new_network(model_class: type[Network], architecture: str) -> Network:
    """Builds a network with fresh weights, drawn from torch's random state as its constructor does.

    Args:
        model_class: Class of diffusers or transformers.
        architecture: A folder with its config.json, or the name of a component of the package.

    Raises:
        ValueError: There is no such folder, or its config.json is of another class.
    """
    folder = find_component(architecture)
    _check_class(model_class, folder)
    if issubclass(model_class, PreTrainedModel):
        return model_class(model_class.config_class.from_pretrained(folder))
    assert issubclass(model_class, ConfigMixin)
    return model_class.from_config(model_class.load_config(folder))


def frozen_network(model_class: type[Network], name: str) -> Network:
    """Loads a trained network in float32, on the CPU.

    Args:
        model_class: Class of diffusers or transformers; of CLIP it may be one of its towers.
        name: A folder as exported, or the name of a component of the package; one without weights gets random ones,
            with a warning.
    """
    folder = find_component(name)
    with quiet_libraries(), torch.device("cpu"):
        if has_weights(folder):
            return model_class.from_pretrained(folder, torch_dtype=torch.float32)
        rank_zero_warn(f"{folder.name}: random weights, what is trained on it means nothing")
        network = build_random_model(model_class, folder, torch.float32)
    assert isinstance(network, model_class)
    return network


def load_start(network: nn.Module, name: str) -> None:
    """Gives a network the weights of a trained one.

    An `AutoencoderKLTemporalDecoder` also takes those of an `AutoencoderKL` of its sizes, as the video models of
    Blattmann et al. (2023), "Align your Latents", section 3.1.1, start from an image model. It then has the same
    latents and decodes frame by frame: its temporal layers begin by changing nothing. With few layers its middle block
    is shorter than the other one's, so its pictures have to be trained.

    Args:
        network: What is to be trained.
        name: A folder as exported, or the name of a component of the package.

    Raises:
        ValueError: There are no weights, or they are of another class or size.
    """
    folder = find_component(name)
    if not has_weights(folder):
        raise ValueError(
            f"start_from is {name}, but there are no weights: it has neither diffusion_pytorch_model.safetensors nor "
            "model.safetensors."
        )
    found = _class_name(read_json(folder, "config.json", "a network's folder"))
    if isinstance(network, AutoencoderKLTemporalDecoder) and found == "AutoencoderKL":
        weights = _frame_by_frame(network.state_dict(), frozen_network(AutoencoderKL, name).state_dict())
    else:
        _check_class(type(network), folder)
        weights = frozen_network(type(network), name).state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"start_from is {name}, whose weights do not fit the architecture: {error}") from error


def _frame_by_frame(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a video autoencoder that decodes each frame as the picture autoencoder of these weights does."""
    found = {}
    for key, value in own.items():
        if key.endswith("temporal_res_block.conv2.weight") or key.endswith("temporal_res_block.conv2.bias"):
            # what this layer gives is added to its block's input
            found[key] = torch.zeros_like(value)
        elif key == "decoder.time_conv_out.weight":
            found[key] = torch.zeros_like(value)
            found[key][:, :, value.shape[2] // 2, 0, 0] = torch.eye(len(value))
        elif key == "decoder.time_conv_out.bias":
            found[key] = torch.zeros_like(value)
        else:
            found[key] = weights.get(key.replace(".spatial_res_block", ""), value)
    if "post_quant_conv.weight" in weights:
        # the video autoencoder lacks this 1 x 1 convolution of the latents: the next one takes it over
        mix, shift = weights["post_quant_conv.weight"][:, :, 0, 0], weights["post_quant_conv.bias"]
        kernel = weights["decoder.conv_in.weight"]
        found["decoder.conv_in.weight"] = torch.einsum("oikl,ij->ojkl", kernel, mix)
        found["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"] + torch.einsum("oikl,i->o", kernel, shift)
    return found


def read_scheduler(name: str) -> Any:
    """Builds the scheduler of a pipeline.

    Args:
        name: An embedded pipeline (`tiny-sd`), or a pipeline's folder.

    Raises:
        ValueError: There is none.
    """
    embedded = MODELS_FOLDER / name
    folder = (embedded if embedded.is_dir() else Path(name).expanduser()) / "scheduler"
    config = read_json(folder, "scheduler_config.json", "the scheduler of a pipeline")
    scheduler_class = find_scheduler(config["_class_name"])
    assert issubclass(scheduler_class, SchedulerMixin)
    return scheduler_class.from_config(config)


def _check_class(model_class: type[nn.Module], folder: Path) -> None:
    found = _class_name(read_json(folder, "config.json", "a network's folder"))
    if found != model_class.__name__:
        raise ValueError(f"{folder} describes a {found}; give the folder of a {model_class.__name__}.")


def _class_name(config: dict[str, Any]) -> str:
    return config.get("_class_name") or (config.get("architectures") or ["network of unknown class"])[0]
