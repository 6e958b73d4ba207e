"""Which stage owns which unit: a cut that is given by module names, or found.

A found cut is contiguous in the order of execution; or it may be folded: its last stage owns both ends of the denoiser,
which keeps the large outer skip connections at home, but lets what the stages see get a step older. The slowest stage's
share of the costs counts first; among cuts within `TOLERANCE` of the best, the one with the fewest stale bytes is
taken. Costs are operations, which are counted, so that every rank and every run comes to the same cut; or they are
times, which ranks must have agreed on.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.units import LATENTS, Graph

TOLERANCE = 0.03
"""How much slower than the best the slowest stage may be for the sake of fewer stale bytes."""


def resolve_cut(graph: Graph, cut: Sequence[Sequence[str]], leaves_out: bool = False) -> list[int]:
    """Turns lists of module names into the stage of each unit.

    Args:
        graph: The denoiser's units.
        cut: For each stage the names of its modules; a name covers all below it.
        leaves_out: Whether names may cover no unit.

    Raises:
        ValueError: A unit is named twice or not at all, a name covers no unit, or a stage is empty.
    """
    owner: list[int | None] = [None] * len(graph.units)
    for stage, names in enumerate(cut):
        for name in names:
            covered = [i for i, unit in enumerate(graph.units) if unit.name == name or unit.name.startswith(name + ".")]
            if not covered and not leaves_out:
                raise ValueError(f"The cut names {name!r} in stage {stage}, but no unit of the denoiser has that name.")
            for i in covered:
                if owner[i] is not None:
                    raise ValueError(f"The cut gives {graph.units[i].name!r} to both stage {owner[i]} and {stage}.")
                owner[i] = stage
        if stage not in owner:
            raise ValueError(f"Stage {stage} of the cut is empty; name at least one module in it.")
    missing = [unit.name for unit, stage in zip(graph.units, owner, strict=True) if stage is None]
    if missing:
        raise ValueError(f"The cut leaves out {len(missing)} units, {missing[0]!r} for one; give each to a stage.")
    return [stage for stage in owner if stage is not None]


def find_cut(graph: Graph, stages: int, costs: Sequence[int] | None = None, folded: bool = False) -> list[int]:
    """Finds the stage of each unit for a number of stages.

    Args:
        graph: The denoiser's units, at the shapes in use.
        stages: Number of stages.
        costs: What each unit costs; None counts its operations.
        folded: Whether the last stage may own both ends of the denoiser.

    Raises:
        ValueError: There are more stages than units.
    """
    if stages == 1:
        return [0] * len(graph.units)
    if stages > len(graph.units):
        raise ValueError(f"{stages} stages are more than the denoiser's {len(graph.units)} units; take fewer stages.")
    search = _Search(graph, costs, folded)
    limit = math.floor(search.least_maximum(stages) * (1 + TOLERANCE))
    candidates = []
    for _, slowest, bounds in search.partitions(stages, limit):
        # bounds: where each stage but the last begins, and where the last one's second part begins
        owner = [stages - 1] * len(graph.units)
        for stage, (start, end) in enumerate(pairwise(bounds)):
            owner[start:end] = [stage] * (end - start)
        # the search takes glue over several stages for less than it is
        candidates.append((bytes_per_step(graph, find_boundary(graph, owner)), slowest, owner))
    return min(candidates)[2]


def cut_names(graph: Graph, owner: Sequence[int]) -> list[list[str]]:
    """The cut as lists of module names, as a user may give it: a name stands for all units below it where it can."""
    names: list[list[str]] = [[] for _ in range(max(owner) + 1)]
    for number, unit in enumerate(graph.units):
        name = unit.name
        for container in graph.containers.values():
            if number in container.units and len({owner[i] for i in container.units}) == 1:
                name = min(name, container.name, key=len)
        if name not in names[owner[number]]:
            names[owner[number]].append(name)
    return names


def cut_hash(names: Sequence[Sequence[str]]) -> str:
    """Twelve letters that tell a cut from another in a table of results."""
    return hashlib.sha256("|".join(",".join(stage) for stage in names).encode()).hexdigest()[:12]


class _Search:
    """Searches the cuts whose stages are `[a, b), ..., [y, z)` and, last, `[0, a)` with `[z, end)`."""

    def __init__(self, graph: Graph, costs: Sequence[int] | None, folded: bool) -> None:
        self.graph = graph
        self.size = len(graph.units)
        self.starts = range(self.size if folded else 1)
        """Where the first stage may begin; what is before it is the last stage's."""
        self.before = [0]
        """Cost of the units before each."""
        for cost in costs or [unit.flops for unit in graph.units]:
            self.before.append(self.before[-1] + cost)
        self._span_cache: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def cost(self, start: int, end: int) -> int:
        return self.before[end] - self.before[start]

    def least_maximum(self, stages: int) -> int:
        """The smallest share of the costs that the slowest stage can have."""
        low, high = self.before[-1] // stages, self.before[-1]
        while low < high:
            middle = (low + high) // 2
            if self._fits(stages, middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _fits(self, stages: int, limit: int) -> bool:
        for start in self.starts:
            if self.before[start] > limit:
                return False
            at = start
            for _ in range(stages - 1):
                at = bisect_right(self.before, self.before[at] + limit) - 1
            if self.before[start] + self.cost(min(at, self.size - 1), self.size) <= limit:
                return True
        return False

    def partitions(self, stages: int, limit: int) -> Iterator[tuple[int, int, list[int]]]:
        """For each pair of ends of the folded stage, the best cut within the limit.

        Yields:
            Stale bytes, cost of the slowest stage, and the bounds.
        """
        for start in self.starts:
            if self.before[start] > limit:
                return
            inner = self._inner(start, stages - 1, limit)
            for end, outer_bytes in self._outer(start, limit):
                if end in inner:
                    stale, slowest, bounds = inner[end]
                    yield stale + outer_bytes, max(slowest, self.before[start] + self.cost(end, self.size)), bounds

    def _inner(self, start: int, stages: int, limit: int) -> dict[int, tuple[int, int, list[int]]]:
        """Best contiguous stages from `start` on, by where they end."""
        best: dict[int, tuple[int, int, list[int]]] = {start: (0, 0, [start])}
        for _ in range(stages):
            found: dict[int, tuple[int, int, list[int]]] = {}
            for begin, (stale, slowest, bounds) in best.items():
                for end, stale_here in self._spans(begin, limit):
                    entry = (stale + stale_here, max(slowest, self.cost(begin, end)), [*bounds, end])
                    if end not in found or entry < found[end]:
                        found[end] = entry
            best = found
        return best

    def _spans(self, start: int, limit: int) -> list[tuple[int, int]]:
        """Ends of a contiguous stage that begins at `start`, with the bytes that it takes in from before."""
        if (start, limit) not in self._span_cache:
            spans = []
            taken: dict[int, int] = {}
            for end in range(start + 1, self.size):
                if self.cost(start, end) > limit:
                    break
                self._take(self.graph.units[end - 1].inputs, range(start), taken)
                spans.append((end, sum(taken.values())))
            self._span_cache[start, limit] = spans
        return self._span_cache[start, limit]

    def _outer(self, start: int, limit: int) -> Iterator[tuple[int, int]]:
        """Where the folded stage `[0, start)` may begin again, with the bytes that it takes in from the middle."""
        taken: dict[int, int] = {}
        self._take(self.graph.result, range(start, self.size), taken)
        for end in range(self.size - 1, start, -1):
            if self.before[start] + self.cost(end, self.size) > limit:
                return
            self._take(self.graph.units[end].inputs, range(start, end), taken)
            for index in [index for index in taken if self.graph.values[index].unit >= end]:
                del taken[index]
            yield end, sum(taken.values())

    def _take(self, values: set[int] | frozenset[int], foreign: range, taken: dict[int, int]) -> None:
        """Adds to `taken` the values that units in `foreign` make; glue over both sides counts by its sources."""
        for index in values:
            if index == LATENTS:
                continue
            value = self.graph.values[index]
            units = self._units_of(index)
            if all(unit in foreign for unit in units):
                taken[index] = value.num_bytes
            elif value.sources:
                self._take(value.sources, foreign, taken)

    def _units_of(self, index: int) -> set[int]:
        value = self.graph.values[index]
        found = {value.unit}
        for source in value.sources - {LATENTS}:
            found |= self._units_of(source)
        return found
