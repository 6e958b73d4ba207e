"""The command line: LightningCLI with our classes, runs that go on and dry runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from asyncdiff_pl import callbacks, strategies
from asyncdiff_pl.callbacks.training_state import CHECKPOINT
from asyncdiff_pl.cli.checkpoints import find_checkpoint, read_checkpoint
from asyncdiff_pl.cli.checks import check_data, check_devices, check_training
from asyncdiff_pl.cli.messages import one_sentence
from asyncdiff_pl.cli.parser import CALLBACKS, SAYS, TRAINED, TRAINING_CALLBACKS, Parser
from asyncdiff_pl.cli.picture_test import PictureTest
from asyncdiff_pl.report.dry_run import describe_run
from asyncdiff_pl.strategies.base import picture_size


class ConfigWriter(SaveConfigCallback):
    """Saves a run's settings in its log folder, such that they start a new run: nothing in them names this one."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        if config.resume is not None:
            for place in logger_folders(config):
                place.version = None
        config.resume = None
        if "dry_run" in config:
            config.dry_run = False
        self.config = config
        super().setup(trainer, pl_module, stage)


class Command(LightningCLI):
    """`predict`, `fit` and `validate` for our modules, data modules, strategies and callbacks."""

    _prepared = ""
    """The subcommand whose parser is being made."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # pipelines are folders of weights, and training goes on in its own log folder: no checkpoint is asked for
        others = {"model", "datamodule", "ckpt_path", "weights_only"}
        found = {
            "predict": {"dataloaders", *others},
            "fit": {"train_dataloaders", "val_dataloaders", *others},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
        }
        # reading the settings of all classes takes a moment for each: only what is asked for, if it is one of them
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        return {asked: found[asked]} if asked in found else found

    @override
    def _parse_ckpt_path(self) -> None:
        """Leaves settings alone: a log folder says with which ones its checkpoint was trained."""

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `seed_everything` where there is training: the seed that counts in `predict` is the model's."""
        if self._prepared in TRAINED:
            parser.add_argument(
                "--seed_everything", type=int, default=0, help="Seed of the first weights and of all that is drawn."
            )

    @override
    def _set_seed(self) -> None:
        if self.subcommand in TRAINED:
            super()._set_seed()

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        is_training = self._prepared in TRAINED
        for key, kind in (TRAINING_CALLBACKS if is_training else CALLBACKS).items():
            parser.add_lightning_class_args(kind, key)
        if is_training:
            parser.add_class_arguments(PictureTest, "pictures")
        if self._prepared == "validate":
            parser.add_lightning_class_args(callbacks.ValidationTable, "table")
        parser.add_argument(
            "--resume",
            metavar="FOLDER",
            type=str | None,
            default=None,
            help=argparse.SUPPRESS
            if self._prepared == "validate"
            else "Log folder of a run that was stopped: what it has done is kept, the rest is done there. Without "
            "--config, the run's own settings are taken.",
        )
        if is_training:
            return
        parser.add_argument(
            "--dry-run",
            dest="dry_run",
            action="store_true",
            help="Check all input, say how many samples, how long and how much disk a run takes, and do nothing.",
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._prepared = subcommand
        kwargs |= {"usage": SAYS[subcommand].usage, "description": SAYS[subcommand].description}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            # all frames of a long run would stay in memory
            parser.set_defaults({"return_predictions": False})
        return parser

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_devices(config.trainer)
        if self.subcommand == "fit":
            check_training(config)
        if self.subcommand == "validate":
            _prepare_validation(config)
        if config.resume is None:
            return
        folder = Path(config.resume)
        places = logger_folders(config)
        if not places:
            raise ValueError("--resume needs a logger with a folder: set trainer.logger to a TensorBoardLogger.")
        for place in places:
            place.save_dir, place.name, place.version = str(folder.parent.parent), folder.parent.name, folder.name

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(one_sentence(str(error), str(self.subcommand))) from error

    @override
    def after_instantiate_classes(self) -> None:
        for part in (self.trainer.strategy, self.datamodule, self.model, *self.trainer.callbacks):
            check = getattr(part, "check", None)
            if check is not None:
                check()
        check_data(self.model, self.datamodule)
        if hasattr(self.trainer.strategy, "check_module"):
            if self.subcommand in TRAINED:
                name = type(self.trainer.strategy).__name__
                raise ValueError(f"trainer.strategy is {name}, which only predicts; take auto or ddp to train.")
            self.trainer.strategy.check_module(self.model, picture_size(self.datamodule))
        # Lightning's answer to SIGTERM is a message to all ranks out of the signal's handler, and then to go on; ours
        # is to end: at once in `predict` (processes.py), in `fit` with the state saved (callbacks/training_state.py)
        self.trainer._signal_connector.register_signal_handlers = lambda: None

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        folder = self.config[subcommand].resume
        if subcommand == "fit" and folder is not None:
            arguments["ckpt_path"] = str(Path(folder) / CHECKPOINT)
        if subcommand == "validate":
            # a table of our own says it
            arguments["verbose"] = False
        return arguments

    def before_predict(self) -> None:
        """Ends a dry run here."""
        if self.config[self.subcommand].dry_run:
            if rank_zero_only.rank == 0:
                print(describe_run(self.trainer, self.model, self.datamodule))
            sys.exit(0)


def run(arguments: list[str]) -> None:
    """Runs the command line.

    Args:
        arguments: What stands behind the program's name, configs by their paths.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    start(
        Command,
        arguments,
        save_config_callback=ConfigWriter,
        trainer_defaults={"use_distributed_sampler": True},
        save_config_kwargs={"overwrite": True},
    )


StartedCommand = TypeVar("StartedCommand", bound=Command)


def start(kind: type[StartedCommand], arguments: list[str], **settings: Any) -> StartedCommand:
    """Reads a config with its overrides, and does what the command is for.

    Args:
        kind: The command.
        arguments: The subcommand, and what stands behind it.
        **settings: Further arguments of `LightningCLI`; without any no config is saved.

    Returns:
        The command, when it is done.
    """
    # from here the parser takes them, and Lightning for the other ranks that it starts
    sys.argv[1:] = with_strategy_classes(arguments)
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=Trainer,
        parser_class=Parser,
        auto_configure_optimizers=False,
        **{"save_config_callback": None, **settings},
    )


def with_strategy_classes(arguments: list[str]) -> list[str]:
    """Tells the parser that a strategy is a class, where it would take a class's name for one of Lightning's names.

    Args:
        arguments: What stands behind the program's name.
    """
    found = [*arguments]
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--trainer.strategy" or not (equals or at + 1 < len(arguments)):
            continue
        value = value if equals else arguments[at + 1]
        if value in strategies.__all__ or re.fullmatch(r"\w+(\.\w+)+", value):
            described = json.dumps({"class_path": value})
            found[at : at + 2 - len(equals)] = [f"{name}={described}"] if equals else [name, described]
    return found


def logger_folders(config: Namespace) -> list[Namespace]:
    """The settings of the loggers that write to a folder."""
    logger = config.trainer.logger
    loggers = logger if isinstance(logger, list) else [logger]
    return [entry.init_args for entry in loggers if hasattr(entry, "init_args")]


def _prepare_validation(config: Namespace) -> None:
    """Finds the checkpoint, and names the log folder after what is done."""
    if config.resume is not None:
        raise ValueError("validate has nothing to go on with: leave `--resume` out, and give `--ckpt_path`.")
    places = logger_folders(config)
    checkpoint = find_checkpoint(config.ckpt_path, places)
    read_checkpoint(checkpoint)
    config.ckpt_path = str(checkpoint.resolve())
    for place in places:
        place.name = f"{place.name}_validate"
