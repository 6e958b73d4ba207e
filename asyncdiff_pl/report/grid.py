"""A sweep's config as cells: each strategy with each of its settings and each step count, and one device always."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asyncdiff_pl.cli.overview import find_config
from asyncdiff_pl.parallel.layout import Layout

STAGES = "asyncdiff_pl.strategies.AsyncDiffStrategy"

AXES = {"stages": "stages", "stride": "stride", "cfg": "cfg", "patches": "patches", "steps": "steps", "ranks": "time"}
"""Settings of strategies that tell a layout's axes, and the axes' names."""

KEYS = {"folder", "config", "settings", "steps", "strategies"}
"""What a sweep's config holds."""

STRATEGY_KEYS = {"name", "class_path", "init_args", "grid", "devices"}
"""What one of its strategies holds."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        name: Name of its log folder.
        steps: Step count.
        devices: Devices that it takes.
        config: Settings of its `predict`.
    """

    name: str
    steps: int
    devices: int
    config: dict[str, Any]

    def digest(self, more: Sequence[str]) -> str:
        """Tells these settings from others.

        Args:
            more: Settings of the command line that are added.
        """
        return hashlib.sha256(json.dumps([self.config, *more], sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Sweep:
    """A sweep: where it writes, and its cells in order."""

    folder: Path
    cells: tuple[Cell, ...]


def read_sweep(path: str, folder: str | None = None) -> Sweep:
    """Reads a sweep's config.

    Args:
        path: A YAML file: `config` (what all cells begin with: a file, or a name of the package's), `settings` (what
            all have in place of that), `steps` (step counts), `strategies` (each a `class_path`, its `init_args` and a
            `grid`, lists of values to take in turn; perhaps a `name` and `devices`), and `folder`.
        folder: Folder for the cells' log folders, in place of the config's.

    Raises:
        ValueError: The config is not one of a sweep.
    """
    given = yaml.safe_load(Path(path).read_bytes())
    _check_keys(path, given, KEYS, {"config", "steps", "strategies"})
    where = Path(folder or given.get("folder") or f"lightning_logs/{Path(path).stem}")
    steps = given["steps"]
    if not isinstance(steps, list) or not steps or not all(isinstance(n, int) and n > 0 for n in steps):
        raise ValueError(f"steps of {path} is {steps}; give a list of step counts, as [10, 25].")
    base = yaml.safe_load(Path(find_config(given["config"])).read_bytes())
    base = _merged(base, given.get("settings") or {})
    strategies = [*_on_one_device(base), *given["strategies"]]
    cells = []
    for entry in strategies:
        _check_keys(path, entry, STRATEGY_KEYS, {"class_path"})
        for number, (name, arguments) in itertools.product(steps, _settings_of(entry)):
            cells.append(_cell(f"{name}_{number}steps", number, entry, arguments, base, where))
    # all layouts of a step count are done before the next begins: a sweep that is stopped has whole comparisons
    cells.sort(key=lambda cell: steps.index(cell.steps))
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two cells of {path} are called {twice[0]}; give their strategies names, as `name: other`.")
    return Sweep(where, tuple(cells))


def _on_one_device(base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What everything is compared with: the pipeline on one device, and compiled as well where that is a GPU."""
    plain = {"name": "one", "class_path": STAGES, "init_args": {"stages": 1}}
    if base.get("trainer", {}).get("accelerator") == "cpu":
        return [plain]
    return [plain, {**plain, "name": "one_compiled", "init_args": {"stages": 1, "compile": "blocks"}}]


def _settings_of(entry: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of a strategy with each of its settings."""
    fixed, grid = entry.get("init_args") or {}, entry.get("grid") or {}
    wrong = next((name for name, values in grid.items() if not isinstance(values, list) or not values), None)
    if wrong is not None:
        raise ValueError(f"grid.{wrong} of a sweep is {grid[wrong]}; give a list of values.")
    found = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        told = varied if "name" in entry else {**fixed, **varied}
        parts = [entry["name"]] if "name" in entry else []
        # stages2, but compile_blocks
        told = {name: f"_{value}" if isinstance(value, str) else value for name, value in told.items()}
        parts += [f"{name}{value}" for name, value in told.items() if value is not None]
        found.append((re.sub(r"[^\w.-]+", "-", "_".join(parts)) or "plain", {**fixed, **varied}))
    return found


def _cell(
    name: str,
    steps: int,
    entry: Mapping[str, Any],
    arguments: dict[str, Any],
    base: Mapping[str, Any],
    folder: Path,
) -> Cell:
    given = {**defaults_of(entry["class_path"]), **arguments}
    layout = Layout(**{axis: given.get(setting) or 1 for setting, axis in AXES.items()})
    devices = entry.get("devices") or (1 if given.get("simulate") else layout.pipeline_ranks)
    config = copy.deepcopy(dict(base))
    trainer = config.setdefault("trainer", {})
    trainer["strategy"] = {"class_path": entry["class_path"], "init_args": arguments}
    trainer["devices"] = devices
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {
            "save_dir": str(folder.parent),
            "name": folder.name,
            "version": name,
            "default_hp_metric": False,
        },
    }
    config.setdefault("model", {}).setdefault("init_args", {})["num_inference_steps"] = steps
    return Cell(name, steps, devices, config)


def defaults_of(class_path: str) -> dict[str, Any]:
    """Settings of a strategy that go without saying.

    Args:
        class_path: Full name of its class.

    Raises:
        ValueError: There is no such class.
    """
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no strategy {class_path}; give its full name, as {STAGES}.") from error
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place; within mappings one by one."""
    found = dict(base)
    for name, value in more.items():
        is_inner = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if is_inner else value
    return found


def _check_keys(path: str, given: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} holds {given} where a sweep has settings; docs/sweeps.md shows one.")
    if not needed <= set(given):
        raise ValueError(f"{path} says nothing of {', '.join(sorted(needed - set(given)))}; a sweep needs it.")
    if set(given) - known:
        raise ValueError(f"{path} has {sorted(set(given) - known)[0]}; a sweep has {', '.join(sorted(known))} there.")
