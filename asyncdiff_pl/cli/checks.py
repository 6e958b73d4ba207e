"""What is wrong with a config, told before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from asyncdiff_pl.callbacks.training_state import CHECKPOINT
from asyncdiff_pl.models.training.optimizer import check_steps


def check_training(config: Namespace) -> None:
    """Tells early that a training run has no end, or nothing to go on from."""
    if not config.trainer.fast_dev_run:
        check_steps(config.trainer.max_steps)
    if config.resume is not None and not (Path(config.resume) / CHECKPOINT).is_file():
        raise ValueError(
            f"{config.resume} holds no {CHECKPOINT}: nothing was saved before the run ended; start it anew, without "
            "--resume."
        )


def check_data(model: LightningModule, datamodule: LightningDataModule) -> None:
    """Tells before anything is loaded that a pipeline does not take pictures of the data's size, or its values."""
    if hasattr(model, "check_inputs") and hasattr(datamodule, "input_names"):
        model.check_inputs(datamodule.input_names)
    check_size(model, datamodule)


def check_size(model: LightningModule, datamodule: LightningDataModule) -> None:
    """Tells that a pipeline does not take pictures of the data's size.

    Args:
        model: What runs, or would.
        datamodule: Where its samples come from.

    Raises:
        ValueError: It does not.
    """
    multiple = getattr(model, "size_multiple", None)
    if not multiple:
        return
    given = {name: getattr(datamodule, name, None) for name in ("height", "width")}
    # a pipeline that makes its pictures from prompts alone does not see the data's
    for (name, pixels), result in zip(given.items(), model.picture_size(*given.values()), strict=True):
        if pixels and result == pixels and pixels % multiple:
            raise ValueError(f"data.{name} is {pixels} pixels; the model takes multiples of {multiple}.")


def check_devices(trainer: Namespace) -> None:
    """Tells early, and in plain words, that the devices asked for are not there."""
    asked = str(trainer.devices)
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\[?\d+(, ?\d+)*,?\]?", asked):
        raise ValueError(f"trainer.devices is {asked}; give a number from 1 up, a list of GPUs, or auto.")
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    present = torch.cuda.device_count()
    if not present:
        raise ValueError(
            f"trainer.accelerator is {trainer.accelerator}, but torch {torch.__version__} finds no GPU on this "
            "machine: start it where GPUs are, or give `--trainer.accelerator cpu`."
        )
    if asked.isdecimal() and int(asked) > present:
        raise ValueError(
            f"trainer.devices is {asked}, but this machine has {present} GPUs: take a layout of fewer ranks, or more "
            "machines (`--trainer.num_nodes`)."
        )
