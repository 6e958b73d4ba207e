"""What a denoiser's call is, once it is cut: the graph, the boundary tensors, and what each stage must run through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from asyncdiff_pl.parallel.exchange import Message
from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.stages.boundary import Boundary, find_boundary
from asyncdiff_pl.parallel.stages.costs import UnitCost
from asyncdiff_pl.parallel.stages.cut import cut_names, find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.units import Graph, trace
from asyncdiff_pl.parallel.stages.worker import messages


@dataclass
class Program:
    """A denoiser's graph and cut for inputs of one structure.

    Args:
        graph: Units and values.
        boundary: Boundary tensors of the cut.
        messages: Messages of a round, in the order that all ranks keep to.
        cut: For each stage the names of its modules.
        numbers: Number of each unit by its module name.
        runs: For each stage the containers that it must run through; it passes over all others.
        measured: Nanoseconds of each unit that the cut balances; None where it balances operations, or was given.
    """

    graph: Graph
    boundary: Boundary
    messages: list[Message]
    cut: list[list[str]]
    numbers: dict[str, int]
    runs: list[frozenset[str]]
    measured: list[int] | None = None

    @classmethod
    def make(
        cls,
        twin: nn.Module,
        forward: Callable[..., Any],
        layout: Layout,
        cut: Sequence[Sequence[str]] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves_out: bool = False,
        measure: Callable[[Graph], list[int]] | None = None,
        folded: bool = False,
    ) -> Program:
        """Traces a denoiser and cuts it.

        Args:
            twin: The denoiser on the meta device.
            forward: Its own forward.
            layout: Stages and stride.
            cut: For each stage the names of its modules; None finds a cut.
            args: Positional arguments of a call.
            kwargs: Keyword arguments of that call.
            leaves_out: Whether the call may leave out modules that the cut names, as a step's second call does that
                skips layers.
            measure: Gives nanoseconds of each unit for a cut to balance, the same on all ranks; None counts operations.
            folded: Whether a found cut's last stage may own both ends of the denoiser.

        Raises:
            ValueError: The cut does not fit the denoiser, or there are more stages than units.
        """
        graph = trace(twin, args, kwargs, find_latents(forward, args, kwargs))
        measured = measure(graph) if measure is not None and cut is None else None
        found = cut is None
        owner = find_cut(graph, layout.stages, measured, folded) if found else resolve_cut(graph, cut, leaves_out)
        boundary = find_boundary(graph, owner, measured)
        return cls(
            graph,
            boundary,
            messages(boundary, layout.stages, layout.ranks_per_half),
            cut_names(graph, owner),
            {unit.name: number for number, unit in enumerate(graph.units)},
            [_containers_to_run(graph, boundary, stage) for stage in range(layout.stages)],
            measured,
        )

    def costs(self) -> list[UnitCost] | None:
        """What each unit costs, in order of execution; None where nothing was measured."""
        if self.measured is None:
            return None
        total = sum(self.measured)
        units = zip(self.graph.units, self.measured, self.boundary.owner, strict=True)
        return [UnitCost(unit.name, ns / 1e6, ns / total, stage) for unit, ns, stage in units]


def _containers_to_run(graph: Graph, boundary: Boundary, stage: int) -> frozenset[str]:
    """Containers with units of the stage, and those whose outputs only running them can give."""
    found = set()
    for name, container in graph.containers.items():
        leaves = [leaf for output in container.outputs for leaf in output.leaves]
        values = [leaf.value for leaf in leaves if leaf.value is not None]
        if (
            any(boundary.owner[unit] == stage for unit in container.units)
            or not all(leaf.is_known for leaf in leaves)
            or any(boundary.maker[value] is None for value in values)
            or any(graph.values[value].unit not in container.units for value in values)
        ):
            found.add(name)
    return frozenset(found)
