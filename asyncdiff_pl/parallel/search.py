"""Which layout a number of ranks should take: what each would cost, how old what its stages see would be, and a choice.

The layouts are those with stride 1 that use all ranks: N stages, or half as many for each half of the guidance batch.
The fastest wins, unless another is nearly as fast and its stages see what is newer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff_pl.parallel.layout import MAX_STAGES, Layout
from asyncdiff_pl.parallel.stages.boundary import Boundary, bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import find_cut
from asyncdiff_pl.parallel.stages.units import LATENTS, Graph

TOLERANCE = 0.1
"""How much slower than the fastest a layout may be whose stages see what is newer."""

BANDWIDTH = {"cuda": 20e9, "cpu": 1e9}
"""Bytes a second that a rank takes in beside its computation, by device: over PCI Express, and gloo on one machine."""


@dataclass(frozen=True)
class Candidate:
    """What a layout would be like.

    Args:
        layout: The layout.
        seconds: Of the denoising of a sample, in the mean over the step counts.
        exact_ms: Milliseconds of an exact step.
        asynchronous_ms: Milliseconds of an asynchronous step: of the slowest stage, or of what it takes in.
        shares: Share of each stage in a whole step's costs.
        staleness: How many steps old the oldest latents are that a unit works from, in the mean over the costs.
        stale_bytes: Bytes of boundary tensors that arrive somewhere in an asynchronous step, for each half of the
            guidance batch that has its own ranks.
    """

    layout: Layout
    seconds: float
    exact_ms: float
    asynchronous_ms: float
    shares: tuple[float, ...]
    staleness: float
    stale_bytes: int

    @property
    def name(self) -> str:
        """Name of the layout."""
        return name_of(self.layout)


def candidates(num_ranks: int, is_guided: bool | None) -> list[Layout]:
    """The layouts with stride 1 that use all ranks.

    Args:
        num_ranks: Ranks that work on one sample.
        is_guided: Whether there is a guidance batch to be halved; None, if that is not known, counts as no.
    """
    cfgs = (2, 1) if is_guided and num_ranks % 2 == 0 else (1,)
    return [Layout(num_ranks // cfg, cfg=cfg) for cfg in cfgs if num_ranks // cfg <= MAX_STAGES]


def predict(
    layout: Layout, graph: Graph, costs: Sequence[int], steps: Sequence[tuple[int, int]], bandwidth: float, folded: bool
) -> Candidate:
    """Foresees what a layout would be like.

    Args:
        layout: The layout, with stride 1.
        graph: The denoiser's units, at the inputs of one of the layout's groups: half a guidance batch with cfg 2.
        costs: Nanoseconds of each unit there.
        steps: For each step count of the run its steps and how many of them are exact.
        bandwidth: Bytes a second that a rank takes in beside its computation.
        folded: Whether the last stage may own both ends of the denoiser.
    """
    owner = find_cut(graph, layout.stages, costs, folded)
    boundary = find_boundary(graph, owner, costs)
    total = sum(costs)
    shares = [sum(cost for cost, k in zip(costs, owner, strict=True) if k == s) / total for s in range(layout.stages)]
    taken_in = max(sum(graph.values[i].num_bytes for i in boundary.consumed_by(s)) for s in range(layout.stages))
    exact = total / 1e6
    asynchronous = max(exact * max(shares), 1e3 * taken_in / bandwidth)
    # one stage is always exact
    counts = [(n, n if layout.stages == 1 else min(fixed, n)) for n, fixed in steps]
    seconds = statistics.fmean((fixed * exact + (n - fixed) * asynchronous) / 1e3 for n, fixed in counts)
    stale_bytes = bytes_per_step(graph, boundary)
    return Candidate(
        layout, seconds, exact, asynchronous, tuple(shares), mean_age(ages(graph, boundary), costs), stale_bytes
    )


def choose(found: Sequence[Candidate]) -> Candidate:
    """The fastest layout, or one within `TOLERANCE` of it whose stages see what is newer.

    Args:
        found: The layouts, one at least.
    """
    limit = min(candidate.seconds for candidate in found) * (1 + TOLERANCE)
    return min((c for c in found if c.seconds <= limit), key=lambda c: (c.staleness, c.seconds))


def explain(found: Sequence[Candidate], chosen: Candidate) -> str:
    """Says in one sentence why a layout was chosen."""
    others = [candidate for candidate in found if candidate is not chosen]
    if not others:
        return f"{chosen.name} is the only layout that fits."
    fastest = min(others, key=lambda c: c.seconds)
    speed = f"{chosen.seconds / fastest.seconds:.2f} of the time of {fastest.name}"
    age = f"what stages see is {chosen.staleness:.2g} steps old in place of {fastest.staleness:.2g}"
    if chosen.staleness == 0:
        age = "it is exact"
    if chosen.seconds > fastest.seconds:
        return f"{chosen.name} takes {speed}, which is near enough, and {age}."
    return f"{chosen.name} takes {speed}" + (f", and {age}." if chosen.staleness < fastest.staleness else ".")


def table(found: Sequence[Candidate], chosen: Candidate) -> str:
    """The layouts as a table for people; the chosen one has a mark."""
    lines = [("", "layout", "s a sample", "ms exact", "ms after", "slowest stage", "steps old", "MiB a step")]
    for c in sorted(found, key=lambda c: c.seconds):
        times = _short(c.seconds), _short(c.exact_ms), _short(c.asynchronous_ms)
        mark = "*" if c is chosen else ""
        lines.append(
            (mark, c.name, *times, f"{max(c.shares):.0%}", f"{c.staleness:.2g}", _short(c.stale_bytes / 2**20))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines)


def name_of(layout: Layout) -> str:
    """A layout in words."""
    stages = f"{layout.stages} stage{'s' * (layout.stages > 1)}"
    return f"cfg 2 x {stages}" if layout.cfg == 2 else stages


def counted_costs(graph: Graph, rate: float) -> list[int]:
    """Nanoseconds of each unit by its operations.

    Args:
        graph: The units.
        rate: Operations a second.
    """
    return [max(1, round(1e9 * unit.flops / rate)) for unit in graph.units]


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def ages(graph: Graph, boundary: Boundary) -> list[int]:
    """For each unit how many steps old the oldest latents are that it works from, with stride 1.

    Args:
        graph: The denoiser's units.
        boundary: The boundary tensors of a cut.
    """
    found: list[int] = []
    for number, unit in enumerate(graph.units):
        sources = _units_of(graph, unit.inputs)
        # a unit that is called twice may see a later one's output
        known = [found[s] + (boundary.owner[s] != boundary.owner[number]) for s in sources if s < number]
        found.append(max(known, default=0))
    return found


def mean_age(ages: Sequence[int], costs: Sequence[int]) -> float:
    """The ages of all units as one number, by what they cost."""
    return sum(age * cost for age, cost in zip(ages, costs, strict=True)) / sum(costs)


def _units_of(graph: Graph, values: set[int] | frozenset[int]) -> set[int]:
    """The units whose outputs went into some values."""
    found: set[int] = set()
    for index in values - {LATENTS}:
        value = graph.values[index]
        found |= _units_of(graph, value.sources) if value.sources else {value.unit}
    return found
