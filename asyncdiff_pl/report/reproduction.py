"""What it takes to make runs again: their environment, the settings of one, and the commands of the others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.cli.overview import PROGRAM
from asyncdiff_pl.report.grid import defaults_of
from asyncdiff_pl.report.run_folders import Run

CONFIG = "reference.yaml"
"""What the page calls the settings that the commands start from."""

NOT_PART = ("trainer.logger", "resume", "dry_run", "trainer.callbacks")
"""Settings that say where a run writes, or how it was started."""

STRATEGY = "trainer.strategy"


def environment(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs ran on, as their log folders tell; several values where the runs differ."""
    found: dict[str, list[str]] = {}
    for run in runs:
        values = {name: run.described.get(name, "") for name in ("device", "dtype", "torch", "diffusers")}
        values["lightning"] = _lightning(run)
        for name, value in values.items():
            found.setdefault(name, [])
            if value and value not in found[name]:
                found[name].append(value)
    memory = {row["memory"] for run in runs for row in read_table(run.folder / "devices.csv")}
    found["peak memory"] = sorted(memory)
    return {name: ", ".join(values) for name, values in found.items() if values}


def settings_text(run: Run) -> str:
    """The settings of a run as YAML, such that they start a new one: nothing in them names its log folder."""
    config = {name: value for name, value in run.config.items() if name not in ("resume", "dry_run")}
    logger = config.get("trainer", {}).get("logger")
    if isinstance(logger, dict):
        arguments = {**logger.get("init_args", {}), "version": None}
        config["trainer"] = {**config["trainer"], "logger": {**logger, "init_args": arguments}}
    return yaml.safe_dump(config, sort_keys=False)


def command_of(run: Run, reference: Run) -> str:
    """The command that makes a run from another one's settings.

    Args:
        run: The run to make.
        reference: The run whose settings are saved as `CONFIG`.
    """
    start = f"{PROGRAM} predict --config {CONFIG}"
    given, base = dict(_flat(run.config)), dict(_flat(reference.config))
    kind = given.get(f"{STRATEGY}.class_path")
    words: list[str] = []
    if kind is not None and kind != base.get(f"{STRATEGY}.class_path"):
        words += [f"--{STRATEGY}", str(kind)]
        # a class of its own begins with its own defaults
        base = {name: value for name, value in base.items() if not name.startswith(f"{STRATEGY}.")}
        base |= {f"{STRATEGY}.init_args.{name}": value for name, value in _defaults(str(kind)).items()}
        base[f"{STRATEGY}.class_path"] = kind
    for name, value in given.items():
        if base.get(name) != value and not name.startswith(NOT_PART):
            words += [f"--{name}", value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)]
    return " ".join([start, *(shlex.quote(word.removesuffix("...\n").strip()) for word in words)])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots and their values; lists are values."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _defaults(class_path: str) -> dict[str, Any]:
    """Settings of a class that go without saying; all are said of one that is not here."""
    try:
        return defaults_of(class_path)
    except ValueError:
        return {}


def _lightning(run: Run) -> str:
    """The version of Lightning, which stands in the first line of config.yaml."""
    path = run.folder / "config.yaml"
    found = re.match(r"# lightning\.pytorch==(\S+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else ""
