"""What a layout would be like, as data: the terms it is foreseen on, and what a link makes of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.patches.settings import PatchMode, PatchSettings
from asyncdiff_pl.parallel.search import BANDWIDTH
from asyncdiff_pl.parallel.steps.settings import StepSettings


@dataclass(frozen=True)
class Link:
    """What connects the ranks of a pipeline.

    Args:
        waited_for: Bytes a second that a rank takes in while the computation waits.
        beside: Bytes a second that it takes in beside the computation, over few channels.
    """

    waited_for: float
    beside: float


LINKS = {"nvlink": Link(190e9, BANDWIDTH["cuda"]), "pcie": Link(BANDWIDTH["cuda"], BANDWIDTH["cuda"])}
"""Known links: between H200s 20 MiB took 111 us over all channels, and 20 GB/s over the two beside a computation."""


@dataclass(frozen=True)
class Terms:
    """The settings that layouts are foreseen with.

    Args:
        samples: For each step count of the run its steps, and how many at the start are exact with stages.
        refresh_every: With stages, each how many-th step after them is exact as well; None for none.
        folded: Whether a found cut's last stage may own both ends of the denoiser.
        cut: A cut that counts for its number of stages; None finds all.
        mode: Mode of patches that is foreseen beside the exact one.
        portion: Share of the neighbours' rows that self-attention sees in it.
        patch_warm_up: Its synchronous steps at the start.
        steps_warm_up: Exact steps before several are computed at a time.
    """

    samples: tuple[tuple[int, int], ...]
    refresh_every: int | None = None
    folded: bool = False
    cut: Sequence[Sequence[str]] | None = None
    mode: PatchMode = "corrected_async_gn"
    portion: float = PatchSettings.portion
    patch_warm_up: int = PatchSettings.warm_up
    steps_warm_up: int = StepSettings.warm_up


class Spent(NamedTuple):
    """What the slowest rank computes for a sample, in whole steps of one GPU.

    Args:
        steps: Steps of the sample.
        exact_steps: Those of them that are exact while others are not.
        exact: Computed in these.
        late: Computed in the others.
    """

    steps: int
    exact_steps: int
    exact: float
    late: float


@dataclass(frozen=True)
class Foreseen:
    """What a layout would be like; bytes are those of a step after warm-up.

    Args:
        layout: The layout, with one data group.
        mode: Mode of its patches; empty where there are none.
        shares: Share of each stage or patch, or of each of the steps at a time, in a whole step's operations.
        spent: What the slowest rank computes for a sample of each step count.
        weight_bytes: The denoiser's weights on a rank.
        sent_bytes: What a run counts, over all ranks of a pipeline: boundary tensors, rows and moments of patches, or
            estimates of steps at a time.
        estimate_bytes: Noise estimates that come on top, likewise: of the output's stage, of patches, of both halves.
        beside_bytes: What the rank that gets most gets beside its computation.
        waited_for_bytes: What the rank that gets most waits for, estimates included.
        waited_for_in_exact: The same in an exact step.
        relay_bytes: Weights with warm-up in a relay, on the rank that has most; None where there is none.
        held_bytes: Buffers on the rank that has most.
        mean_age: How many steps old the oldest is that a unit works from, in the mean over the operations: latents with
            stages, rows with patches, with steps at a time the estimate that latents are foreseen with.
        oldest: The same where it is oldest.
        cut: For each stage the names of its modules; empty where nothing is cut.
    """

    layout: Layout
    mode: str
    shares: tuple[float, ...]
    spent: tuple[Spent, ...]
    weight_bytes: int
    sent_bytes: int = 0
    estimate_bytes: int = 0
    beside_bytes: int = 0
    waited_for_bytes: int = 0
    waited_for_in_exact: int = 0
    relay_bytes: int | None = None
    held_bytes: int = 0
    mean_age: float = 0.0
    oldest: int = 0
    cut: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The layout in words."""
        return layout_name(self.layout, self.mode)

    @property
    def boundaries(self) -> int:
        """How many boundaries of stages lie behind one another."""
        return self.oldest // self.layout.stride if self.layout.stages > 1 else 0

    @property
    def speed_up(self) -> float:
        """One GPU's time for the samples by the layout's, by operations alone, exact steps included."""
        return sum(each.steps for each in self.spent) / sum(each.exact + each.late for each in self.spent)

    def link_ms(self, link: Link) -> float:
        """Milliseconds that the bytes of a step after warm-up take into the rank that gets most."""
        return 1e3 * (self.waited_for_bytes / link.waited_for + self.beside_bytes / link.beside)

    def is_hidden(self, link: Link, step_ms: float) -> bool | None:
        """Whether steps hide what comes in beside them; None where nothing does.

        Args:
            link: What connects the ranks.
            step_ms: Milliseconds of a whole step on one GPU.
        """
        if not self.beside_bytes:
            return None
        each = 1e3 * self.beside_bytes / link.beside
        return all((spent.steps - spent.exact_steps) * each <= spent.late * step_ms for spent in self.spent)

    def speed_up_on(self, link: Link, step_ms: float) -> float:
        """The speed-up with the link's milliseconds.

        Args:
            link: What connects the ranks.
            step_ms: Milliseconds of a whole step on one GPU.
        """
        ms = 0.0
        for spent in self.spent:
            late_steps = spent.steps - spent.exact_steps
            ms += spent.exact * step_ms + spent.exact_steps * 1e3 * self.waited_for_in_exact / link.waited_for
            ms += max(spent.late * step_ms, late_steps * 1e3 * self.beside_bytes / link.beside)
            ms += late_steps * 1e3 * self.waited_for_bytes / link.waited_for
        return sum(spent.steps for spent in self.spent) * step_ms / ms

    def with_data(self, groups: int) -> Foreseen:
        """The same for so many data groups."""
        return replace(self, layout=replace(self.layout, data=groups))


def layout_name(layout: Layout, mode: str = "") -> str:
    """A layout in words, without its data groups.

    Args:
        layout: The layout.
        mode: Mode of its patches; empty for any.
    """
    parts = ["cfg 2"] if layout.cfg == 2 else []
    parts += [f"{number} {name}" for name in ("stages", "patches", "steps") if (number := getattr(layout, name)) > 1]
    more = ([f"stride {layout.stride}"] if layout.stride > 1 else []) + ([mode] if mode else [])
    return ", ".join([" x ".join(parts) or "1 GPU", *more])
