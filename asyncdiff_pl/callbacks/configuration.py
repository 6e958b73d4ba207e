"""What a run was: the columns that describe it, and the settings that a run which goes on must share."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from lightning.pytorch import LightningModule, Trainer

from asyncdiff_pl.callbacks.device_stats import device_name
from asyncdiff_pl.callbacks.roles import data_size

COLUMNS = (
    *("model", "weights", "scorer", "scheduler", "strategy", "stages", "stride", "warm_up", "time_shift", "cfg"),
    *("simulate", "world_size", "data_groups", "cut", "device", "dtype", "seed", "torch", "diffusers"),
)
"""Columns of every results.csv, in order; what a strategy describes beyond them comes after."""

FREE = {"world_size", "data_groups", "torch", "diffusers", "data.num_workers", "module.num_inference_steps"}
"""Settings that may differ between the runs of one log folder; limits on the data (`max_...`) may as well."""

FOREIGN = ("lightning", "torch", "builtins", "typing", "abc")
"""Packages whose constructors are not asked for settings."""


def configuration(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What describes a run in results.csv.

    The strategy says of itself what its `describe()` gives, or its class's name; the scorer is the name that a callback
    has as `scorer`; what callbacks have as `described` (the reference that they compare with) comes last.

    Returns:
        A value for each of `COLUMNS`, None where it does not apply or is not known yet, and the rest of `describe()`.
    """
    strategy = {"strategy": type(trainer.strategy).__name__}
    if hasattr(trainer.strategy, "describe"):
        strategy |= trainer.strategy.describe()
    dtype = getattr(pl_module, "torch_dtype", pl_module.dtype)
    scorers = [callback.scorer for callback in trainer.callbacks if hasattr(callback, "scorer")]
    found = {
        "model": getattr(pl_module, "pretrained", type(pl_module).__name__),
        "weights": getattr(pl_module, "weights_description", getattr(pl_module, "weights", None)),
        "scorer": scorers[0] if scorers else None,
        "scheduler": getattr(pl_module, "scheduler_name", None),
        "world_size": trainer.world_size,
        "data_groups": data_size(trainer),
        "device": device_name(trainer.strategy.root_device),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": getattr(pl_module, "seed", None),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    described = {k: v for callback in trainer.callbacks for k, v in getattr(callback, "described", {}).items()}
    return {**dict.fromkeys(COLUMNS), **found, **strategy, **described}


def settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What shapes the pictures and the times of a run, as JSON has it.

    It is the configuration and what the constructors of the module and of the data module were given, as far as that is
    kept under the arguments' names, without `FREE` and without limits on the data.
    """
    found = configuration(trainer, pl_module)
    if not hasattr(trainer.strategy, "describe"):
        # Lightning's own strategies share samples out and leave the pictures as they are: any will do
        found["strategy"] = None
    found |= {f"module.{name}": value for name, value in arguments(pl_module).items()}
    if trainer.datamodule is not None:
        given = {name: value for name, value in arguments(trainer.datamodule).items() if not name.startswith("max_")}
        found |= {f"data.{name}": value for name, value in given.items()}
    return json.loads(json.dumps({name: value for name, value in found.items() if name not in FREE}))


def arguments(thing: Any) -> dict[str, Any]:
    """The plain values (numbers, texts, lists) that an object keeps under the names of its constructor's arguments.

    Where an object is made from its name (`scheduler`, `pipeline`), the name is kept as `scheduler_name`.
    """
    kinds = [kind for kind in type(thing).__mro__ if kind.__module__.partition(".")[0] not in FOREIGN]
    constructors = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)]
    names = dict.fromkeys(name for init in constructors for name in inspect.signature(init).parameters)
    found = {}
    for name in names:
        attribute = f"{name}_name" if hasattr(thing, f"{name}_name") else name
        if not hasattr(thing, attribute):
            continue
        value = getattr(thing, attribute)
        try:
            found[name] = json.loads(json.dumps(str(value) if isinstance(value, Path) else value))
        except TypeError:
            continue
    return found


def difference(folder: Path, now: dict[str, Any], complete: bool) -> str | None:
    """Says in which setting a run differs from the one that its log folder holds.

    Args:
        folder: Log folder.
        now: Settings of the run that starts.
        complete: Whether all settings are known by now; otherwise one that is None is not compared.

    Returns:
        One sentence for the first setting that differs; None if none does, or if the folder holds no run yet.
    """
    path = folder / "settings.json"
    if not path.exists():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old != new and (complete or new is not None):
            return (
                f"The run in {folder} has {name} {old!r} but this one has {new!r}: give the same to go on with it, "
                "or another log folder to start a new one."
            )
    return None
