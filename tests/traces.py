"""One trace for all denoisers of a kind: it takes up to a second, and most tests are about what comes after it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from asyncdiff_pl.parallel.stages.units import Graph, trace

PLACES = ("parallel.stages.program", "report.dry_run", "strategies.layout_choice")
"""Modules of the package that trace."""

_KNOWN: dict[Any, Graph] = {}


@contextlib.contextmanager
def shared_traces() -> Iterator[None]:
    """Has the package take a trace that this process made already, of the same network and shapes of inputs."""
    # ranks have not imported all of them, and need not
    places = [sys.modules[name] for name in (f"asyncdiff_pl.{place}" for place in PLACES) if name in sys.modules]
    for place in places:
        place.trace = _trace_once
    try:
        yield
    finally:
        for place in places:
            place.trace = trace


def known_traces() -> dict[Any, Graph]:
    """What this process has traced, to be handed to others."""
    return _KNOWN


def take_traces(known: dict[Any, Graph]) -> None:
    """Takes over what another process has traced."""
    _KNOWN.update(known)


def _trace_once(twin: nn.Module, args: tuple, kwargs: dict, latents: torch.Tensor) -> Graph:
    leaves, spec = tree_flatten((args, kwargs))
    inputs = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    weights = tuple((name, weight.shape, weight.dtype) for name, weight in twin.named_parameters())
    key = type(twin), weights, inputs, spec
    if key not in _KNOWN:
        _KNOWN[key] = trace(twin, args, kwargs, latents)
    return _KNOWN[key]
