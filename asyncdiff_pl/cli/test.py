"""`test`: pictures of a DDPM that was trained, and how near they are to those that it was trained on."""

from __future__ import annotations

from typing_extensions import override

from asyncdiff_pl.cli.checkpoints import export, find_checkpoint, find_pipeline
from asyncdiff_pl.cli.command import Command, logger_folders, run, start
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.processes import own_rank


class TestCommand(Command):
    """Reads the config as `fit` does, and makes of it the arguments of a run of `predict`."""

    arguments: list[str]

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"test": {"model", "dataloaders", "datamodule", "verbose", "weights_only"}}

    @override
    def instantiate_classes(self) -> None:
        found = self.parser.instantiate_classes(self.config)["test"]
        self.model, self.datamodule, self.settings = found.model, found.data, found.pictures

    @override
    def after_instantiate_classes(self) -> None:
        if not isinstance(self.model, DDPM):
            raise ValueError(
                f"test measures the pictures of a DDPM, and the config's model is {type(self.model).__name__}: give a "
                "config of DDPM's, or `validate` it."
            )
        if not hasattr(self.datamodule, "real_pictures"):
            raise ValueError(
                f"{type(self.datamodule).__name__} has no method `real_pictures(number)`, which says where the "
                "training pictures are; add one."
            )

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        loggers = logger_folders(config)
        pipeline = find_pipeline(config.ckpt_path) or export(find_checkpoint(config.ckpt_path, loggers), self.model)
        if hasattr(self.datamodule, "check"):
            self.datamodule.check()
        if own_rank() == 0:
            self.datamodule.prepare_data()
        for place in loggers:
            place.name = f"{place.name}_test"
        real = self.datamodule.real_pictures(self.settings.max_real)
        self.arguments = self.settings.arguments(pipeline.resolve(), real.resolve(), config.trainer)


def run_test(arguments: list[str]) -> None:
    """Runs `test`, which is a run of `predict` in the end.

    Args:
        arguments: What stands behind `test`, configs by their paths.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        run(["predict", *arguments])
        return
    command = start(TestCommand, ["test", *arguments])
    run(["predict", *command.arguments])
