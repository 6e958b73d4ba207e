"""What `predict --help` and `fit --help` say: the run's own options, our classes' settings, the trainer's last."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jsonargparse

from asyncdiff_pl.cli.overview import PROGRAM, TRAINING, list_configs

RUN = "the run"

LINE = 118
"""Characters of a line of the text about a class."""

CONFIG_HELP = "A YAML file, or the name of one of the package's own, below; what follows it overrides it."


@dataclass(frozen=True)
class Help:
    """What a subcommand says of itself.

    Args:
        usage: The line that the parser shows first; it also tells the subcommand's parser from others.
        description: What the subcommand does.
        trainer: Title of the trainer's settings.
        trainer_settings: What of the trainer's settings matters; the others are accepted as well.
        hints: A line under a section's title, by where its class stands in a config.
        configs: Which of the packaged configs it takes; see `list_configs`.
    """

    usage: str
    description: str
    trainer: str
    trainer_settings: tuple[str, ...]
    hints: Mapping[str, str]
    configs: str


PREDICT = Help(
    usage=f"{PROGRAM} predict --config CONFIG [--SETTING VALUE ...] [--resume FOLDER] [--dry-run]",
    description="""\
Runs a diffusion pipeline over a data set, on as many ranks as there are devices, and writes frames, animations, scores
and times to a log folder. Every setting below can stand in the config, and on the command line after it.""",
    trainer="the trainer (Lightning's own settings, without those of training)",
    trainer_settings=(
        *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks"),
        *("limit_predict_batches", "enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
        *("inference_mode", "profiler", "plugins", "default_root_dir"),
    ),
    hints={
        "model": "another class: --model PipelinePredictor, UnconditionalPredictor (below) or my_module.MyPredictor; "
        "all its settings: --model.help CLASS",
        "data": "another class: --data PromptFile, ClassLabels, Unconditional (below) or my_module.MyData; all its "
        "settings: --data.help CLASS",
        "trainer.strategy": "another class: --trainer.strategy PatchStrategy, StepParallelStrategy, "
        "TimeParallelStrategy (below) or my_module.MyStrategy; on all devices one sample each: --trainer.strategy ddp",
    },
    configs="",
)

FIT = Help(
    usage=f"{PROGRAM} fit --config CONFIG [--SETTING VALUE ...] [--resume FOLDER]",
    description="""\
Trains one network of a diffusion pipeline, on one device or on several (--trainer.strategy ddp), and writes curves,
pictures, the state to go on from and the trained weights to a log folder. Every setting below can stand in the config,
and on the command line after it.""",
    trainer="the trainer (Lightning's own settings, without those of predicting)",
    trainer_settings=(
        *("max_steps", "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks"),
        *("max_time", "val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "num_sanity_val_steps"),
        *("log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
        *("enable_progress_bar", "enable_model_summary", "deterministic", "benchmark", "detect_anomaly", "profiler"),
        *("plugins", "sync_batchnorm", "default_root_dir"),
    ),
    hints={
        "model": "another class: --model DDPM (below), AutoencoderTraining, CLIPTraining, "
        "ImageDenoiserTraining, ClassDenoiserTraining or my_module.MyTraining; its settings: --model.help CLASS",
        "data": "another class: --data Cifar10 (below) or my_module.MyData; its settings: --data.help CLASS",
    },
    configs=TRAINING,
)

CHECKPOINT_HELP = "Log folder of a run of `fit`, or a checkpoint; the newest run of the config if not given."

CHECKPOINTS = """\
--ckpt_path takes a checkpoint, or the log folder of a run of `fit`, whose last state counts; the config may then be
left out. Without it, the newest run of the config is taken. The weights are the moving average, as in training."""

VALIDATE = Help(
    usage=f"{PROGRAM} validate [--config CONFIG] [--ckpt_path RUN|FILE] [--SETTING VALUE ...]",
    description=f"""\
Runs the validation of training with a checkpoint, and writes its measures to a table and to TensorBoard, in a log
folder with the config's name and `_validate`. {CHECKPOINTS}
All settings of `fit` count here too.""",
    trainer="the trainer (Lightning's own settings, as for training)",
    trainer_settings=("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "limit_val_batches"),
    hints={"data": "or another class, as the config says"},
    configs=TRAINING,
)

TEST = Help(
    usage=f"{PROGRAM} test [--config CONFIG] [--ckpt_path RUN|FILE|PIPELINE] [--SETTING VALUE ...] [--resume FOLDER]",
    description=f"""\
Makes pictures with a DDPM that was trained, on all devices, and measures them against those that it was trained on:
Fréchet distance (FID), improved precision and recall. It is a run of `predict`, in a log folder with the config's name
and `_test`; --resume goes on with one that was stopped. {CHECKPOINTS}
--ckpt_path also takes the folder of an exported pipeline. All settings of `fit` count here too.""",
    trainer="the trainer (Lightning's own settings, as for training)",
    trainer_settings=("accelerator", "devices", "num_nodes", "logger", "benchmark", "enable_progress_bar"),
    hints={"data": "or another class, as the config says; its training pictures are the real ones"},
    configs=TRAINING,
)


def sections(parser: jsonargparse.ArgumentParser, says: Help, own_keys: set[str]) -> list[argparse._ArgumentGroup]:
    """The options of a subcommand in two sections, the run's and the trainer's.

    Args:
        parser: The parser of the subcommand.
        says: What the subcommand says of itself.
        own_keys: First names of the settings that are explained apart.
    """
    run, trainer = (argparse._ArgumentGroup(parser, title) for title in (RUN, says.trainer))
    for action in parser._actions:
        first, _, second = action.dest.partition(".")
        if first == "trainer" and second.partition(".")[0] in says.trainer_settings:
            trainer._group_actions.append(action)
        elif first not in {"trainer", "return_predictions", *own_keys}:
            run._group_actions.append(action)
        if action.dest == "config":
            action.help = CONFIG_HELP
        if action.dest == "ckpt_path":
            action.help = CHECKPOINT_HELP
    return [run, trainer]


def explain(text: str, says: Help, classes: Mapping[str, type], others: Mapping[str, Sequence[type]]) -> str:
    """The help of a subcommand.

    Args:
        text: What argparse makes of the `sections`.
        says: What the subcommand says of itself.
        classes: Classes whose settings are explained between them, by where they stand in a config.
        others: Classes that may stand there in place of these; what they share with them is not explained again.
    """
    run, _, trainer = text.partition(f"\n{says.trainer}:\n")
    parts = [run.rstrip(), f"configs of the package (`--config NAME`):\n{list_configs(says.configs)}"]
    for place, kind in classes.items():
        parts.append(_section(place, kind, says.hints.get(place)))
        seen = set(_defaults(place, kind))
        for other in others.get(place, ()):
            parts.append(_section(place, other, _shared(place, other, seen), seen))
            seen |= set(_defaults(place, other))
    return "\n\n".join([*parts, f"{says.trainer}:\n{trainer}"])


def settings_parser(place: str, kind: type, hidden: Collection[str] = ()) -> jsonargparse.ArgumentParser:
    """A parser of one class's settings alone.

    Args:
        place: Where the class stands in a config.
        kind: The class.
        hidden: Settings that its help leaves out.
    """
    parser = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(kind, place)
    # what jsonargparse adds for a setting that may be a dataclass; the setting's own text explains that
    names = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
    for group in parser._action_groups:
        # a class as a whole, from a file of its own: nobody would look for it among its settings
        group._group_actions = [
            action
            for action in group._group_actions
            if action.dest in names
            and action.dest.removeprefix(f"{place}.") not in hidden
            and not any(name.startswith(f"{action.dest}.") for name in names)
        ]
    return parser


def _section(place: str, kind: type, hint: str | None, hidden: Collection[str] = ()) -> str:
    _, _, settings = settings_parser(place, kind, hidden).format_help().strip("\n").partition("\n")
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    lines = [f"{place}: {kind.__name__}", f"  {summary}"]
    if hint is not None:
        lines.append(textwrap.fill(f"({hint})", LINE, initial_indent="  ", subsequent_indent="   "))
    return "\n".join([*lines, settings]).rstrip()


def _defaults(place: str, kind: type) -> dict[str, object]:
    return dict(vars(settings_parser(place, kind).get_defaults().get(place) or argparse.Namespace()))


def _shared(place: str, kind: type, seen: Collection[str]) -> str:
    """The settings that a class shares with those explained before it, with its own defaults."""
    required = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    shown = []
    for name, default in _defaults(place, kind).items():
        if name in seen:
            shown.append(f"{name} {'required' if name in required else _as_yaml(default)}")
    return f"--{place} {kind.__name__}; as above, with these defaults: {', '.join(shown)}; and beyond them:"


def _as_yaml(value: object) -> str:
    """A default as it would stand in a config."""
    if isinstance(value, argparse.Namespace):
        return f"{{{', '.join(f'{name}: {_as_yaml(entry)}' for name, entry in vars(value).items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
