"""Schedulers by name, built from the config of a checkpoint's own."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers


def build_scheduler(name: str | None, current: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """Builds a scheduler from the config of the checkpoint's own.

    Args:
        name: A name that `find_scheduler` knows; null keeps the class of `current`.
        current: The checkpoint's scheduler.
        changes: Entries of its config that differ.

    Returns:
        The scheduler.

    Raises:
        ValueError: If there is no such scheduler, or it has no such entry.
    """
    if name is None and not changes:
        return current
    kind = type(current) if name is None else find_scheduler(name)
    check_scheduler_config(kind, changes or {})
    return kind.from_config(current.config, **(changes or {}))


def check_learned_variance(network: Any, scheduler: Any) -> None:
    """Tells that an unconditional network's learned variances have nobody to take them.

    Pipelines with conditions leave them out themselves.

    Args:
        network: The pipeline's denoiser.
        scheduler: Its scheduler.

    Raises:
        ValueError: In one sentence.
    """
    if not isinstance(network, diffusers.UNet2DModel) or network.config.out_channels == network.config.in_channels:
        return
    # diffusers keeps what it does not know in a config: only those that name it take it
    takes = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    if not takes or scheduler.config.variance_type not in ("learned", "learned_range"):
        raise ValueError(
            f"The network learned its steps' variances, which {type(scheduler).__name__} does not take; leave "
            "scheduler and its variance_type as the checkpoint has them, or take UnconditionalPredictor, which makes "
            "DDIM's steps with it as well."
        )


def check_scheduler_config(kind: type[Any], changes: Mapping[str, Any]) -> None:
    """Tells that a scheduler has no such entries in its config.

    Args:
        kind: The scheduler's class.
        changes: Entries of its config.

    Raises:
        ValueError: In one sentence.
    """
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "args", "kwargs")]
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise ValueError(
            f"scheduler_config has {unknown[0]}, which {kind.__name__} does not know; it knows {', '.join(known)}."
        )


def find_scheduler(name: str) -> type[Any]:
    """Finds a scheduler's class, without loading anything of a checkpoint.

    Args:
        name: `euler_discrete`, `ddpm`, `ddim`, `dpm_solver_multistep`, ..., a class name of diffusers, or a class with
            its module (`my_package.MyScheduler`).

    Returns:
        The class; it has `from_config`.

    Raises:
        ValueError: If there is no such scheduler.
    """
    module, _, class_name = name.rpartition(".")
    try:
        if module:
            scheduler_class = getattr(importlib.import_module(module), class_name)
        else:
            scheduler_class = getattr(diffusers, _scheduler_names()[_normalised(name)])
        _ = scheduler_class.from_config
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            f"There is no scheduler {name}; take euler_discrete, ddpm, ddim, dpm_solver_multistep, pndm or another "
            "scheduler of diffusers, or a class with its module (my_package.MyScheduler)."
        ) from error
    return scheduler_class


def _normalised(name: str) -> str:
    return name.replace("_", "").lower().removesuffix("scheduler")


@functools.cache
def _scheduler_names() -> dict[str, str]:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    return {_normalised(name): name for name in names}
