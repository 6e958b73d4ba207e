"""Chooses a layout for a module and a number of ranks: what the search needs to know, and what a run says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.guidance import find_latents, split_batch
from asyncdiff_pl.parallel.search import (
    BANDWIDTH,
    Candidate,
    candidates,
    choose,
    counted_costs,
    explain,
    name_of,
    predict,
    table,
)
from asyncdiff_pl.parallel.stages.costs import agreed_costs
from asyncdiff_pl.parallel.stages.stopwatch import denoising_rate
from asyncdiff_pl.parallel.stages.units import Graph, trace

ExampleCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A layout that was chosen, and why.

    Args:
        layout: The layout.
        reason: Why, in one sentence.
        basis: What it was chosen by.
        candidates: What each layout would be like; empty where that could not be foreseen.
    """

    layout: Layout
    reason: str
    basis: str
    candidates: tuple[Candidate, ...] = ()

    def describe(self) -> str:
        """The choice for people: a table of the candidates and the reason."""
        own = [candidate for candidate in self.candidates if candidate.layout == self.layout]
        lines = [table(self.candidates, own[0])] if own else []
        return "\n".join([*lines, f"layout (by {self.basis}): {self.reason}"])

    def as_json(self) -> dict[str, Any]:
        """The choice as the log folder keeps it, and `kept_layout` reads it."""
        return {
            "stages": self.layout.stages,
            "stride": self.layout.stride,
            "cfg": self.layout.cfg,
            "basis": self.basis,
            "reason": self.reason,
            "candidates": [
                {
                    "layout": c.name,
                    "seconds_a_sample": c.seconds,
                    "ms_exact": c.exact_ms,
                    "ms_asynchronous": c.asynchronous_ms,
                    "shares": list(c.shares),
                    "staleness": c.staleness,
                    "stale_bytes": c.stale_bytes,
                }
                for c in self.candidates
            ],
        }


def kept_layout(kept: Mapping[str, Any]) -> Layout:
    """The layout that a log folder keeps."""
    return Layout(kept["stages"], kept["stride"], kept["cfg"])


def possible_layouts(num_ranks: int, is_guided: bool | None, allows: Callable[[Layout], bool]) -> list[Layout]:
    """The layouts among which one is chosen.

    Args:
        num_ranks: Ranks that work on one sample.
        is_guided: Whether there is a guidance batch; None if that is not known.
        allows: Whether the other settings go with a layout.

    Raises:
        ValueError: There is none.
    """
    found = [layout for layout in candidates(num_ranks, is_guided) if allows(layout)]
    if not found:
        raise ValueError(
            f"layout auto finds no layout of {num_ranks} ranks for this model and these settings: start another "
            "number of devices, or take layout fixed with stages and cfg."
        )
    return found


def choose_layout(
    num_ranks: int,
    is_guided: bool | None,
    allows: Callable[[Layout], bool],
    example_call: Callable[[], ExampleCall | None],
    steps: Sequence[tuple[int, int]],
    device: torch.device,
    denoiser: nn.Module | None = None,
    folded: bool = False,
) -> Choice:
    """Chooses stages and guidance axis.

    Args:
        num_ranks: Ranks that work on one sample.
        is_guided: Whether there is a guidance batch; None if that is not known.
        allows: Whether the other settings go with a layout.
        example_call: Gives a denoiser on the meta device and the arguments of one call; None if they are not known.
        steps: For each step count of the run its steps and how many of them are exact.
        device: Where the denoiser computes.
        denoiser: The denoiser itself, to be measured on the device, not compiled; None counts operations.
        folded: Whether a stage may own both ends of the denoiser.

    Raises:
        ValueError: No layout of so many ranks is possible.
    """
    found = possible_layouts(num_ranks, is_guided, allows)
    if len(found) == 1:
        return Choice(found[0], f"{name_of(found[0])} is the only layout that fits.", "the number of ranks")
    example = example_call()
    if example is None:
        reason = f"{name_of(found[0])} is taken unseen, since the split of the guidance batch in it is exact."
        return Choice(found[0], reason, "the number of ranks")
    cost_of = _measured(denoiser, device) if denoiser is not None else _counted(device)
    foreseen, graphs = [], {}
    for layout in found:
        if layout.cfg not in graphs:
            graphs[layout.cfg] = _graph_and_costs(layout, example, cost_of)
        graph, costs = graphs[layout.cfg]
        if layout.stages <= len(graph.units):
            bandwidth = BANDWIDTH.get(device.type, BANDWIDTH["cpu"])
            foreseen.append(predict(layout, graph, costs, steps, bandwidth, folded))
    if not foreseen:
        raise ValueError(f"{num_ranks} ranks are more than the denoiser has units to share out; start fewer devices.")
    chosen = choose(foreseen)
    basis = "counted operations" if denoiser is None else "measured times"
    return Choice(chosen.layout, explain(foreseen, chosen), basis, tuple(foreseen))


CostOf = Callable[[nn.Module, Graph, tuple[Any, ...], dict[str, Any]], list[int]]


def _graph_and_costs(layout: Layout, example: ExampleCall, cost_of: CostOf) -> tuple[Graph, list[int]]:
    twin, args, kwargs = example
    if layout.cfg == 2:
        args, kwargs = split_batch(twin.forward, args, kwargs, 0)
    graph = trace(twin, args, kwargs, find_latents(twin.forward, args, kwargs))
    return graph, cost_of(twin, graph, args, kwargs)


def _counted(device: torch.device) -> CostOf:
    rates: dict[torch.dtype, float] = {}

    def cost_of(twin: nn.Module, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        dtype = find_latents(twin.forward, args, kwargs).dtype
        if dtype not in rates:
            rates[dtype] = denoising_rate(device, dtype)
        return counted_costs(graph, rates[dtype])

    return cost_of


def _measured(denoiser: nn.Module, device: torch.device) -> CostOf:
    generator = torch.Generator(device).manual_seed(0)

    def filled(like: torch.Tensor) -> torch.Tensor:
        if not like.dtype.is_floating_point:
            return torch.zeros(like.shape, dtype=like.dtype, device=device)
        # zeros would take less power, and so less time
        return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator)

    def cost_of(twin: nn.Module, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        args, kwargs = tree_map_only(torch.Tensor, filled, (args, kwargs))
        return agreed_costs(denoiser, denoiser.forward, graph, args, kwargs)

    return cost_of
