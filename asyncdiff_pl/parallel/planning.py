"""What a denoiser would be like under each layout, from a forward on the meta device: no weights, no ranks, no GPU.

Work is counted in operations, so that speed-ups are ideal: the slowest rank's share of them, and the schedule's own
exact steps. Bytes are those that a run counts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from asyncdiff_pl.parallel.foreseen import Foreseen, Spent, Terms
from asyncdiff_pl.parallel.guidance import split_batch
from asyncdiff_pl.parallel.layout import MAX_STAGES, Layout
from asyncdiff_pl.parallel.patches.rows import shares
from asyncdiff_pl.parallel.patches.settings import PatchMode, PatchSettings
from asyncdiff_pl.parallel.search import ages, mean_age
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import cut_names, find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.schedule import plan_step
from asyncdiff_pl.parallel.steps.settings import round_of
from asyncdiff_pl.parallel.work import Work


def layouts_for(ranks: int, is_guided: bool | None) -> list[Layout]:
    """The layouts of so many ranks, one data group each: whole, in stages, in patches, several steps at a time.

    Args:
        ranks: Ranks of a pipeline.
        is_guided: Whether there is a guidance batch to be halved; None, if that is not known, counts as no.
    """
    found = []
    for cfg in (2, 1) if is_guided and ranks % 2 == 0 else (1,):
        each = ranks // cfg
        if each == 1:
            found.append(Layout(cfg=cfg))
            continue
        found += [Layout(each, cfg=cfg)] if each <= MAX_STAGES else []
        found += [Layout(each - 1, 2, cfg)] if 2 <= each - 1 <= MAX_STAGES else []
        found += [Layout(cfg=cfg, patches=each), Layout(cfg=cfg, steps=each)]
    return found


class Planner:
    """Foresees layouts of one denoiser.

    Args:
        twin: The denoiser on the meta device.
        args: Positional arguments of a call, guidance batch included.
        kwargs: Keyword arguments of that call.
        terms: The settings.
    """

    def __init__(self, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms) -> None:
        self.terms = terms
        self._call = twin, args, kwargs
        self._works: dict[int, Work] = {}

    def work(self, cfg: int = 1) -> Work:
        """A whole call, or with cfg 2 that of one half of the guidance batch.

        Raises:
            ValueError: There are no halves.
        """
        if cfg not in self._works:
            twin, args, kwargs = self._call
            if cfg == 2:
                args, kwargs = split_batch(twin.forward, args, kwargs, 0)
            self._works[cfg] = Work.of(twin, args, kwargs)
        return self._works[cfg]

    def foresee(self, layout: Layout) -> list[Foreseen]:
        """What a layout would be like: patches in two modes, the exact one first, all else in one way.

        Args:
            layout: The layout, with one data group.

        Raises:
            ValueError: The denoiser cannot be run so.
        """
        if layout.patches > 1:
            return [self._patches(layout, mode) for mode in dict.fromkeys(("full_sync", self.terms.mode))]
        if layout.steps > 1:
            return [self._steps(layout)]
        return [self._stages(layout) if layout.stages > 1 else self._whole(layout)]

    def _part(self, layout: Layout) -> float:
        """Share of a whole step's operations that the ranks of a half compute together."""
        return self.work(layout.cfg).flops / self.work().flops

    def _whole(self, layout: Layout) -> Foreseen:
        work, part = self.work(), self._part(layout)
        spent = tuple(Spent(n, n, n * part, 0.0) for n, _ in self.terms.samples)
        # each rank gets the other half
        exchanged = work.estimate_bytes if layout.cfg == 2 else 0
        return Foreseen(
            *(layout, "", (part,), spent, work.weight_bytes),
            estimate_bytes=exchanged,
            waited_for_bytes=exchanged // 2,
            waited_for_in_exact=exchanged // 2,
        )

    def _stages(self, layout: Layout) -> Foreseen:
        work, terms = self.work(layout.cfg), self.terms
        graph, stages, stride = work.graph, layout.stages, layout.stride
        is_given = terms.cut is not None and len(terms.cut) == stages
        owner = resolve_cut(graph, terms.cut) if is_given else find_cut(graph, stages, None, terms.folded)
        boundary = find_boundary(graph, owner)
        flops, weights = [0] * stages, [0] * stages
        for unit, size, stage in zip(graph.units, work.unit_bytes, owner, strict=True):
            flops[stage] += unit.flops
            weights[stage] += size
        part = self._part(layout)
        parts = tuple(part * own / work.flops for own in flops)
        spent = tuple(self._rounds(layout, n, exact, parts, boundary.output_stage) for n, exact in terms.samples)
        copies = [1 + (stride - 1) * (stage == boundary.output_stage) for stage in range(stages)]
        taken_in = max(sum(graph.values[i].num_bytes for i in boundary.consumed_by(stage)) for stage in range(stages))
        aged, estimate = ages(graph, boundary), self.work().estimate_bytes
        return Foreseen(
            *(layout, "", parts, spent, work.weight_bytes),
            # messages of a round serve all of its steps
            sent_bytes=layout.cfg * bytes_per_step(graph, boundary, copies) // stride,
            estimate_bytes=(layout.pipeline_ranks - 1) * estimate,
            beside_bytes=taken_in // stride,
            waited_for_bytes=estimate,
            waited_for_in_exact=estimate // 2 if layout.cfg == 2 else 0,
            relay_bytes=work.weight_bytes - sum(work.unit_bytes) + max(weights),
            held_bytes=2 * taken_in,
            mean_age=stride * mean_age(aged, [unit.flops for unit in graph.units]),
            oldest=stride * max(aged),
            cut=cut_names(graph, owner),
        )

    def _rounds(self, layout: Layout, num_steps: int, warm_up: int, parts: tuple[float, ...], output: int) -> Spent:
        """What the slowest stage computes for a sample."""
        exact, late = 0, 0.0
        for step in range(num_steps):
            plan = plan_step(
                *(step, num_steps),
                stages=layout.stages,
                stride=layout.stride,
                warm_up=warm_up,
                refresh_every=self.terms.refresh_every,
                output_stage=output,
            )
            exact += plan.is_exact
            late += max((parts[turn.stage] for turn in plan.turns if turn), default=0.0)
        return Spent(num_steps, exact, exact * self._part(layout), late)

    def _patches(self, layout: Layout, mode: PatchMode) -> Foreseen:
        work, terms = self.work(layout.cfg), self.terms
        if work.patches is None:
            raise ValueError(
                f"patches are for the UNets of Stable Diffusion, SDXL, Stable Video Diffusion and AnimateDiff, and the "
                f"denoiser is a {type(self._call[0]).__name__}."
            )
        is_synchronous = mode == "full_sync"
        settings = PatchSettings(layout, mode, terms.patch_warm_up, 1.0 if is_synchronous else terms.portion)
        rows = shares(work.rows, layout.patches, work.row_unit)
        part, estimate = self._part(layout), self.work().estimate_bytes
        parts = tuple(part * own / work.rows for own in rows)
        late, early = (
            [work.patches.volume(rows, patch, settings, step) for patch in range(layout.patches)]
            for step in (terms.patch_warm_up, 0)
        )
        spent = []
        for n, _ in terms.samples:
            exact = sum(settings.is_synchronous(step) for step in range(n))
            spent.append(Spent(n, exact, exact * max(parts), (n - exact) * max(parts)))
        # each rank gets the rows of the others of its half, and then the other half
        gathered = estimate // layout.cfg * (work.rows - min(rows)) // work.rows
        gathered += estimate // 2 if layout.cfg == 2 else 0
        return Foreseen(
            *(layout, mode, parts, tuple(spent), work.weight_bytes),
            sent_bytes=layout.cfg * sum(volume.received for volume in late),
            estimate_bytes=(layout.patches - 1) * estimate + (layout.cfg - 1) * layout.patches * estimate,
            beside_bytes=max(volume.beside for volume in late),
            waited_for_bytes=gathered + max(volume.waited_for for volume in late),
            waited_for_in_exact=gathered + max(volume.waited_for for volume in early),
            held_bytes=max(volume.held for volume in late),
            mean_age=0.0 if is_synchronous else 1.0,
            oldest=0 if is_synchronous else 1,
        )

    def _steps(self, layout: Layout) -> Foreseen:
        work, part, estimate = self.work(), self._part(layout), self.work().estimate_bytes
        spent = []
        for n, _ in self.terms.samples:
            rounds = [round_of(step, n, layout.steps, self.terms.steps_warm_up) for step in range(n)]
            exact = rounds.count(None)
            spent.append(Spent(n, exact, exact * part, len(set(rounds) - {None}) * part))
        half = estimate // 2 if layout.cfg == 2 else 0
        return Foreseen(
            *(layout, "", (part / layout.steps,) * layout.steps, tuple(spent), work.weight_bytes),
            sent_bytes=layout.cfg * (layout.steps - 1) * estimate,
            estimate_bytes=2 * half,
            # once a round
            waited_for_bytes=((layout.steps - 1) * estimate + half) // layout.steps,
            waited_for_in_exact=half,
            # a rank foresees with the estimate that it made in the round before; the first has nothing to foresee
            mean_age=layout.steps - 1.0,
            oldest=layout.steps,
        )
