"""What each unit costs on the device in use, measured at the shapes in use.

The whole denoiser runs once. Each unit is then timed by itself, with the inputs that it just had (stopwatch.py). What a
block does between its units (its glue) is the time of the block less that of its units, and is shared out over these
by the size of what they make. Ranks agree: the first rank of a pipeline measures, and of several pipelines under the
same conditions the one that is done first counts for all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils._pytree import tree_map

from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.stages.cost_cache import conditions, key_of, load_costs, store_costs
from asyncdiff_pl.parallel.stages.stopwatch import Stopwatch, stopwatch_for
from asyncdiff_pl.parallel.stages.units import Container, Graph, split_modules

Call = Callable[..., Any]


@dataclass(frozen=True)
class UnitCost:
    """What a unit costs.

    Args:
        unit: Its module name.
        ms: Milliseconds of one call of the denoiser, with its share of the glue around it.
        share: Share of them in the whole denoiser's.
        stage: The stage that has it.
    """

    unit: str
    ms: float
    share: float
    stage: int


class Probe:
    """Times units and blocks while the denoiser runs.

    Args:
        graph: The denoiser's units and containers.
        stopwatch: Times runs.
    """

    def __init__(self, graph: Graph, stopwatch: Stopwatch) -> None:
        self.costs = [0] * len(graph.units)
        """Nanoseconds of each unit so far."""
        self._graph = graph
        self._stopwatch = stopwatch
        self._numbers = {unit.name: number for number, unit in enumerate(graph.units)}
        self._inside: str | None = None
        self._is_timing = False

    def run_piece(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a piece; times it if it is a unit."""
        output = call(*args, **kwargs)
        if not self._is_timing and name in self._numbers:
            self.costs[self._numbers[name]] += max(1, self._time(name, lambda: call(*args, **kwargs)))
        return output

    def run_container(self, name: str, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a container; times the glue of an outermost one, with that of all containers in it."""
        container = self._graph.containers.get(name)
        if self._inside is not None or container is None or not container.units:
            return call(*args, **kwargs)
        before = sum(self.costs)
        self._inside = name
        try:
            output = call(*args, **kwargs)
            in_units = sum(self.costs) - before
            whole = self._time(name, lambda: call(*args, **kwargs))
        finally:
            self._inside = None
        self._share_out(container, whole - in_units)
        return output

    def _time(self, name: str, run: Callable[[], Any]) -> int:
        self._is_timing = True
        try:
            return self._stopwatch(name, run)
        finally:
            self._is_timing = False

    def _share_out(self, container: Container, glue: int) -> None:
        """Adds a container's glue to its units, by the size of what they make."""
        made = dict.fromkeys(sorted(container.units), 0)
        for value in self._graph.values:
            if value.unit in made and not value.sources:
                made[value.unit] += value.num_bytes
        for number, num_bytes in made.items():
            # less than nothing is noise
            self.costs[number] += max(0, glue) * num_bytes // sum(made.values())


def measure(
    denoiser: nn.Module,
    forward: Call,
    graph: Graph,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stopwatch: Stopwatch,
) -> list[int]:
    """Runs a denoiser once and times its units.

    Args:
        denoiser: The network, with whatever hooks it has.
        forward: Its own forward, past its hooks.
        graph: Its units, as traced at these inputs.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
        stopwatch: Times runs.

    Returns:
        Nanoseconds of each unit, 1 at least.

    Raises:
        ValueError: Weights are not where the inputs are, all of them.
    """
    device = find_latents(forward, args, kwargs).device
    # in a relay, placeholders with a single element stand for the weights of other stages
    away = [w for w in denoiser.parameters() if w.device != device or w.untyped_storage().nbytes() < w.nbytes]
    if away:
        raise ValueError(
            f"balance measured runs the whole denoiser on {device}, but {len(away)} of its weights are not there: "
            "measure with warm_up_mode replicated and without offloading first (the costs are kept), or take balance "
            "operations."
        )
    probe = Probe(graph, stopwatch)
    containers, pieces = split_modules(denoiser)
    # UNets take T2I adapters' residuals out of the lists that they are given
    args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
    with torch.no_grad(), _wrapped(pieces, probe.run_piece), _wrapped(containers, probe.run_container):
        forward(*args, **kwargs)
    assert all(probe.costs), "a unit of the trace did not run"
    return probe.costs


def agreed_costs(
    denoiser: nn.Module,
    forward: Call,
    graph: Graph,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compile: str = "none",
    exchange: Exchange | None = None,
) -> list[int]:
    """Costs of a denoiser's units, the same on all ranks: read from disk where they were measured before.

    Args:
        denoiser: The network, with whatever hooks it has.
        forward: Its own forward, past its hooks.
        graph: Its units, as traced at these inputs.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
        compile: What of it is compiled.
        exchange: Messages of the ranks of a pipeline, which must all call this; None for one process.

    Returns:
        Nanoseconds of each unit.

    Raises:
        ValueError: They have to be measured, and weights are not where the inputs are.
    """
    device = find_latents(forward, args, kwargs).device
    costs = [0] * len(graph.units)
    if exchange is None or dist.get_rank(exchange.groups.pipeline) == 0:
        found = conditions(denoiser, forward, args, kwargs, device, compile)
        kept = load_costs(found, graph)
        costs = measure(denoiser, forward, graph, args, kwargs, stopwatch_for(device)) if kept is None else kept
        if kept is None and device.type == "cuda":
            # what the run itself took: recordings gave theirs back
            torch.cuda.empty_cache()
        costs = _of_the_first(key_of(found), costs)
        if costs != kept:
            store_costs(found, graph, costs)
    if exchange is None:
        return costs
    numbers = torch.tensor(costs, device=device)
    exchange.broadcast([numbers], 0)
    return numbers.tolist()


def _of_the_first(key: str, costs: list[int]) -> list[int]:
    """What the first pipeline of this run found for a key; the others, which may be elsewhere, do not wait for it."""
    if not dist.is_initialized():
        return costs
    return json.loads(_get_default_store().compare_set(f"asyncdiff_pl/costs/{key}", "", json.dumps(costs)))


@contextlib.contextmanager
def _wrapped(
    modules: dict[str, nn.Module], run: Callable[[str, Call, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Puts `run` around the forwards of modules."""
    own = {name: vars(module).get("forward") for name, module in modules.items()}

    def around(name: str, call: Call) -> Call:
        return lambda *args, **kwargs: run(name, call, args, kwargs)

    try:
        for name, module in modules.items():
            module.forward = around(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if own[name] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own[name]
