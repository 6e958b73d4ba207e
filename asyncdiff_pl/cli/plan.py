"""`plan`: which layouts fit a number of GPUs, and what each would gain, send and hold; without weights or GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from asyncdiff_pl.cli.checks import check_size
from asyncdiff_pl.cli.command import Command, start
from asyncdiff_pl.cli.messages import one_sentence
from asyncdiff_pl.cli.overview import PROGRAM
from asyncdiff_pl.parallel.foreseen import LINKS, Link
from asyncdiff_pl.report.plan import Plan
from asyncdiff_pl.strategies.base import picture_size

HELP = f"""\
usage: {PROGRAM} plan --config CONFIG [--gpus N ...] [--SETTING VALUE ...]

Prints the layouts that fit a number of GPUs, for the model, sizes and settings of a config of `predict`: the share of
the slowest rank, the ideal speed-up, bytes a step between ranks, memory of a rank, and how old the inputs are. Nothing
is loaded or measured, and no GPU is needed.

  --gpus N ...          GPUs in all, one number or several; by default trainer.devices x trainer.num_nodes
  --trainer.num_nodes N machines that they are in: a pipeline stays within one, data groups do not (default 1)
  --link NAME           what connects the ranks of a pipeline: {" or ".join(LINKS)} (default nvlink)
  --bandwidth GB/S      the same as gigabytes a second into a rank, in place of a name
  --step_ms MS          milliseconds of a step on one GPU, as step_latency has them: speed-ups then count the link
  --csv FILE            write the plan as numbers, with the cuts, in full

All settings of `predict` count here too: {PROGRAM} predict --help."""


class PlanCommand(Command):
    """Reads the config as `predict` does, and makes no more of it than the model, the data module and the strategy."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpus", type=str, nargs="+", default=None)
        parser.add_argument("--link", type=str, default="nvlink")
        parser.add_argument("--bandwidth", type=float | None, default=None)
        parser.add_argument("--step_ms", type=float | None, default=None)
        parser.add_argument("--csv", type=str | None, default=None)

    @override
    def before_instantiate_classes(self) -> None:
        """Leaves the devices alone: they need not be there."""

    @override
    def instantiate_classes(self) -> None:
        try:
            found = self.parser.instantiate_classes(self.config)[self.subcommand]
        except ValueError as error:
            raise ValueError(one_sentence(str(error))) from error
        self.model, self.datamodule, self.strategy = found.model, found.data, _strategy(found.trainer.strategy)

    @override
    def after_instantiate_classes(self) -> None:
        check_size(self.model, self.datamodule)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        num_nodes = config.trainer.num_nodes
        gpus = _gpus(config)
        if config.step_ms is not None and config.step_ms <= 0:
            raise ValueError(f"step_ms is {config.step_ms}; give a number of milliseconds above 0.")
        size = picture_size(self.datamodule)
        plan = Plan(self.model, self.strategy, size, _link(config.link, config.bandwidth), config.step_ms)
        print(plan.describe(gpus, num_nodes))
        if config.csv is not None:
            plan.write(Path(config.csv), gpus, num_nodes)


def run_plan(arguments: list[str]) -> None:
    """Runs `plan` and prints its tables.

    Args:
        arguments: What stands behind `plan`, configs by their paths.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    start(PlanCommand, ["predict", *arguments])


def _gpus(config: Namespace) -> list[int]:
    """Numbers of GPUs that are asked for, or that a config has."""
    asked = config.gpus or [str(config.trainer.devices)]
    for number in asked:
        if re.fullmatch(r"[1-9]\d*", number):
            continue
        if config.gpus:
            raise ValueError(f"gpus is {number}; give numbers from 1 up.")
        raise ValueError(f"trainer.devices is {number}, which does not say how many GPUs there are: give `--gpus N`.")
    return [int(number) * (1 if config.gpus else config.trainer.num_nodes) for number in asked]


def _strategy(given: Any) -> Any:
    """The strategy of a config: an object, or one that Lightning knows by a name."""
    if not isinstance(given, str) or given == "auto":
        return given
    if given not in StrategyRegistry:
        raise ValueError(
            f"trainer.strategy is {given}, which is no strategy's name: give AsyncDiffStrategy, PatchStrategy, "
            "StepParallelStrategy or auto."
        )
    return StrategyRegistry.get(given)


def _link(name: str, bandwidth: float | None) -> Link:
    """The link that was asked for."""
    if bandwidth is None:
        if name not in LINKS:
            raise ValueError(f"link is {name}; give {' or '.join(LINKS)}, or a bandwidth in GB/s.")
        return LINKS[name]
    if bandwidth <= 0:
        raise ValueError(f"bandwidth is {bandwidth} GB/s; give a number above 0.")
    return Link(1e9 * bandwidth, 1e9 * bandwidth)
