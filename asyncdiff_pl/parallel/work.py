"""What a call of a denoiser is made of, found by one forward on the meta device: operations, bytes, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.patches.pipeline import KINDS
from asyncdiff_pl.parallel.patches.rows import ROWS, row_unit
from asyncdiff_pl.parallel.patches.volume import PatchShapes, watched
from asyncdiff_pl.parallel.stages.units import Graph, trace


@dataclass(frozen=True)
class Work:
    """What a call of a denoiser is made of.

    Args:
        graph: Its units and values.
        patches: What layers that look beyond a patch are given; None if it cannot be run in patches.
        rows: Rows of the latents.
        row_unit: What the rows of a patch are a multiple of.
        estimate_bytes: Size of the noise estimate that it makes.
        weight_bytes: Size of all weights.
        unit_bytes: Size of each unit's weights.
    """

    graph: Graph
    patches: PatchShapes | None
    rows: int
    row_unit: int
    estimate_bytes: int
    weight_bytes: int
    unit_bytes: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Operations of the call."""
        return sum(unit.flops for unit in self.graph.units)

    @classmethod
    def of(cls, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
        """Runs the denoiser once.

        Args:
            twin: The denoiser on the meta device.
            args: Positional arguments of a call.
            kwargs: Keyword arguments of that call.
        """
        latents = find_latents(twin.forward, args, kwargs)
        made: list[int] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            made.append(sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)))

        handle = twin.register_forward_hook(note)
        try:
            patches = None
            if isinstance(twin, KINDS):
                with watched(twin) as patches:
                    graph = trace(twin, args, kwargs, latents)
            else:
                graph = trace(twin, args, kwargs, latents)
        finally:
            handle.remove()
        unit_bytes = tuple(_weight_bytes(twin.get_submodule(unit.name)) for unit in graph.units)
        unit = row_unit(twin) if patches else 1
        return cls(graph, patches, latents.shape[ROWS], unit, made[0], _weight_bytes(twin), unit_bytes)


def _weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
