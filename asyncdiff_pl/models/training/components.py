"""The networks that training builds anew or takes as they are, from folders as exported or from the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.loading import MODELS_FOLDER, find_scheduler, has_weights, quiet_libraries, read_json
from asyncdiff_pl.models.random_weights import build_random_model

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
    config = read_json(folder, "config.json", "a network's folder")
    found = config.get("_class_name") or (config.get("architectures") or ["network of unknown class"])[0]
    if found != model_class.__name__:
        raise ValueError(f"{folder} describes a {found}; give the folder of a {model_class.__name__}.")
