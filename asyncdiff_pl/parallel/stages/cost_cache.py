"""Measured costs of units on disk: what was measured once is read by later runs under the same conditions.

The conditions are all that the times depend on: the network and its configuration, the inputs, the device, how it is
compiled, and the versions. A file that cannot be read counts as none, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import asyncdiff_pl
from asyncdiff_pl.cache import CACHE_VARIABLE, cache_folder
from asyncdiff_pl.parallel.stages.timestep import without_timestep
from asyncdiff_pl.parallel.stages.units import Graph


def conditions(
    denoiser: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    compile: str,
) -> dict[str, Any]:
    """What the times of a denoiser's units depend on, as JSON has it.

    Args:
        denoiser: The network.
        forward: Its own forward.
        args: Positional arguments of the call that is measured.
        kwargs: Keyword arguments of that call.
        device: Where it computes.
        compile: What of it is compiled.
    """
    leaves, spec = tree_flatten(without_timestep(forward, args, kwargs))
    config = {name: value for name, value in dict(getattr(denoiser, "config", {})).items() if name[0] != "_"}
    parts = [(name, type(part).__qualname__) for name, part in denoiser.named_modules()]
    weights = [(name, tuple(weight.shape), str(weight.dtype)) for name, weight in denoiser.named_parameters()]
    processors = getattr(denoiser, "attn_processors", {})
    found = {
        "denoiser": type(denoiser).__qualname__,
        "config": config,
        # adapters add modules, and pipelines swap the attention
        "modules": hashlib.sha256(repr((parts, weights)).encode()).hexdigest(),
        "attention": sorted({type(processor).__qualname__ for processor in processors.values()}),
        "inputs": [_what_counts(leaf) for leaf in leaves],
        "structure": hashlib.sha256(str(spec).encode()).hexdigest(),
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "precision": torch.get_float32_matmul_precision(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "compile": compile,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "asyncdiff_pl": asyncdiff_pl.__version__,
    }
    return json.loads(json.dumps(found, default=str))


def key_of(found: dict[str, Any]) -> str:
    """Twenty letters that tell conditions from others."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:20]


def load_costs(found: dict[str, Any], graph: Graph) -> list[int] | None:
    """Nanoseconds of each unit as they were measured under the same conditions; None if they were not.

    Args:
        found: The conditions.
        graph: The denoiser's units.
    """
    path = _path(found)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["ns"]
        costs = [kept[unit.name] for unit in graph.units]
        if not all(isinstance(ns, int) and ns > 0 for ns in costs) or len(kept) != len(costs):
            raise ValueError("it holds other units, or no times")
        return costs
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        warnings.warn(f"The costs in {path} cannot be read ({error!r}): they are measured anew.", stacklevel=2)
        return None


def store_costs(found: dict[str, Any], graph: Graph, costs: Sequence[int]) -> None:
    """Keeps the costs of units for later runs; a folder that cannot be written to is a warning.

    Args:
        found: The conditions under which they were measured.
        graph: The denoiser's units.
        costs: Nanoseconds of each.
    """
    path = _path(found)
    content = {
        "conditions": found,
        "ns": {unit.name: int(ns) for unit, ns in zip(graph.units, costs, strict=True)},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several runs may measure at once: each writes a file of its own, and the last one stays
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"Measured costs could not be kept in {path.parent} ({error}): the next run measures again; set "
            f"{CACHE_VARIABLE} to a folder that can be written to.",
            stacklevel=2,
        )


def _path(found: dict[str, Any]) -> Path:
    return cache_folder() / "costs" / f"{key_of(found)}.json"


def _what_counts(leaf: Any) -> Any:
    """What of an argument decides how long units take."""
    if isinstance(leaf, torch.Tensor):
        return [list(leaf.shape), str(leaf.dtype)]
    return leaf if isinstance(leaf, bool | int | str) else None
