"""What `predict --help` says: the run's own options, our classes' settings by where they stand, the trainer's last."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping

import jsonargparse

from asyncdiff_pl.cli.overview import PROGRAM, list_configs

USAGE = f"{PROGRAM} predict --config CONFIG [--SETTING VALUE ...] [--resume FOLDER] [--dry-run]"

DESCRIPTION = """\
Runs a diffusion pipeline over a data set, on as many ranks as there are devices, and writes frames, animations, scores
and times to a log folder. Every setting below can stand in the config, and on the command line after it."""

RUN, TRAINER = "the run", "the trainer (Lightning's own settings, without those of training)"

CONFIG_HELP = "A YAML file, or the name of one of the package's own, below; what follows it overrides it."

TRAINER_SETTINGS = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "limit_predict_batches"),
    *("enable_progress_bar", "enable_model_summary", "deterministic", "benchmark", "inference_mode", "profiler"),
    *("plugins", "default_root_dir"),
)
"""What of the trainer's settings matters when nothing is trained; the others are accepted as well."""

HINTS = {
    "model": "another class: --model my_module.MyPredictor; its settings: --model.help my_module.MyPredictor",
    "data": "another class: --data my_module.MyData; its settings: --data.help my_module.MyData",
    "trainer.strategy": "another class: --trainer.strategy my_module.MyStrategy; on all devices one sample each: "
    "--trainer.strategy ddp",
}
"""A line under a section's title, by where its class stands in a config."""


def sections(parser: jsonargparse.ArgumentParser, own_keys: set[str]) -> list[argparse._ArgumentGroup]:
    """The options of `predict` in two sections, the run's and the trainer's.

    Args:
        parser: The parser of `predict`.
        own_keys: First names of the settings that are explained apart.
    """
    run, trainer = (argparse._ArgumentGroup(parser, title) for title in (RUN, TRAINER))
    for action in parser._actions:
        first, _, second = action.dest.partition(".")
        if first == "trainer" and second.partition(".")[0] in TRAINER_SETTINGS:
            trainer._group_actions.append(action)
        elif first not in {"trainer", "return_predictions", *own_keys}:
            run._group_actions.append(action)
        if action.dest == "config":
            action.help = CONFIG_HELP
    return [run, trainer]


def explain(text: str, classes: Mapping[str, type]) -> str:
    """The help of `predict`.

    Args:
        text: What argparse makes of the `sections`.
        classes: Classes whose settings are explained between them, by where they stand in a config.
    """
    run, _, trainer = text.partition(f"\n{TRAINER}:\n")
    parts = [run.rstrip(), f"configs of the package (`--config NAME`):\n{list_configs()}"]
    parts += [_section(place, kind) for place, kind in classes.items()]
    return "\n\n".join([*parts, f"{TRAINER}:\n{trainer}"])


def settings_parser(place: str, kind: type) -> jsonargparse.ArgumentParser:
    """A parser of one class's settings alone."""
    parser = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(kind, place)
    for group in parser._action_groups:
        # the class as a whole, from a file of its own: nobody would look for it among its settings
        group._group_actions = [action for action in group._group_actions if action.dest != place]
    return parser


def _section(place: str, kind: type) -> str:
    _, _, settings = settings_parser(place, kind).format_help().strip("\n").partition("\n")
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    lines = [f"{place}: {kind.__name__}", f"  {summary}"]
    if place in HINTS:
        lines.append(f"  ({HINTS[place]})")
    return "\n".join([*lines, settings]).rstrip()
