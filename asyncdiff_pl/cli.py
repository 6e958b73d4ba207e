"""The command line: LightningCLI with our classes, named configs, resumed runs and dry runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from asyncdiff_pl import callbacks, data, models, strategies
from asyncdiff_pl.report.dry_run import describe_run

SETTINGS = {
    "model": [models.VideoPredictor],
    "data": [data.CocoCaptions],
    "trainer.strategy": [strategies.AsyncDiffStrategy],
}
"""Classes whose settings `--help` explains, by where they stand in a config."""

CALLBACKS = {
    "clip_score": callbacks.CLIPScore,
    "step_latency": callbacks.StepLatency,
    "device_stats": callbacks.DeviceStats,
    "traffic": callbacks.Traffic,
    "frame_writer": callbacks.FrameWriter,
    "results": callbacks.Results,
    "progress_bar": callbacks.DiffusionProgressBar,
}
"""Callbacks of every run, by the key of their settings; more stand at `trainer.callbacks`."""


class Parser(LightningArgumentParser):
    """Explains our classes' settings in `--help`, and ends bad arguments in one sentence."""

    @override
    def format_help(self) -> str:
        text = super().format_help()
        if not any(action.dest == "model" for action in self._actions):
            return text
        sections = [text]
        for place, classes in SETTINGS.items():
            for kind in classes:
                explained = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
                explained.add_class_arguments(kind, place)
                body = explained.format_help().split("\n", 1)[-1].strip("\n")
                sections.append(f"{place}: class_path {kind.__module__.rsplit('.', 1)[0]}.{kind.__name__}\n{body}")
        return "\n\n".join(sections) + "\n"

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ValueError(_one_sentence(message)) from ex


class Command(LightningCLI):
    """`predict` for our modules, data modules, strategies and callbacks."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"predict": {"model", "dataloaders", "datamodule"}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, key)
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Log folder of a run that was stopped: what it has done is kept, the rest is done there.",
        )
        parser.add_argument(
            "--dry-run",
            dest="dry_run",
            action="store_true",
            help="Check all input, say how many samples, how long and how much disk a run takes, and do nothing.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.resume is None:
            return
        folder = Path(config.resume)
        if not folder.is_dir():
            raise ValueError(f"There is no log folder {folder} to resume; give the folder that the stopped run named.")
        logger = config.trainer.logger
        loggers = logger if isinstance(logger, list) else [logger]
        places = [entry.init_args for entry in loggers if hasattr(entry, "init_args")]
        if not places:
            raise ValueError("--resume needs a logger with a folder: set trainer.logger to a TensorBoardLogger.")
        folder = folder.resolve()
        for place in places:
            place.update({"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name})

    @override
    def after_instantiate_classes(self) -> None:
        if not isinstance(self.datamodule, LightningDataModule):
            raise ValueError("The config names no data: set `data`, CocoCaptions for one.")
        for part in (self.trainer.strategy, self.datamodule, self.model, *self.trainer.callbacks):
            check = getattr(part, "check", None)
            if check is not None:
                check()

    def before_predict(self) -> None:
        """Ends a dry run here."""
        if self.config[self.subcommand].dry_run:
            if rank_zero_only.rank == 0:
                print(describe_run(self.trainer, self.model, self.datamodule))
            sys.exit(0)


def run(arguments: list[str]) -> None:
    """Runs the command line.

    Args:
        arguments: What stands behind the program's name.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    _quieten()
    sys.argv[1:] = arguments
    Command(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=Trainer,
        trainer_defaults={"use_distributed_sampler": True},
        parser_class=Parser,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        save_config_kwargs={"overwrite": True},
        args=[*_with_named_configs(arguments)],
    )


def _with_named_configs(arguments: list[str]) -> list[str]:
    """Turns the name of a packaged config into its path, where no file of that name is here."""
    found, is_config = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_config:
            argument = _find_config(argument)
        elif name in ("--config", "-c") and equals:
            argument = f"{name}={_find_config(value)}"
        is_config = argument in ("--config", "-c")
        found.append(argument)
    return found


def _find_config(name: str) -> str:
    if Path(name).is_file():
        return name
    packaged = resources.files("asyncdiff_pl") / "configs"
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    candidate = Path(str(packaged)) / f"{plain}.yaml"
    if candidate.is_file():
        return str(candidate)
    listed = sorted(path.relative_to(str(packaged)).with_suffix("") for path in Path(str(packaged)).rglob("*.yaml"))
    raise ValueError(f"There is no config {name}; give a YAML file or one of {', '.join(map(str, listed))}.")


def _one_sentence(message: str) -> str:
    """What jsonargparse says, without its indented repetitions."""
    lines = [line.strip(" -") for line in str(message).splitlines() if line.strip(" -")]
    return " ".join(lines)[:600]


def _quieten() -> None:
    """Leaves warnings of libraries that a user can do nothing about out of the terminal."""
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for pattern in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",
        ".*overridden `transfer_batch_to_device`.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    # pictures are read with PIL on purpose: torchvision is not needed
    logging.getLogger("transformers").addFilter(lambda record: "requires torchvision" not in record.getMessage())
