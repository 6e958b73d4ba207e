"""The layouts that fit a number of GPUs, as a table: what each would gain, send, hold, and how old its inputs would be.

Nothing is measured and no weight is loaded: the denoiser runs on the meta device, and needs no GPU.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from asyncdiff_pl.parallel.foreseen import Foreseen, Link, Terms, layout_name
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.planning import Planner, layouts_for
from asyncdiff_pl.parallel.warm_up import span_of
from asyncdiff_pl.report.dry_run import noise_before, operations
from asyncdiff_pl.strategies import AsyncDiffStrategy, PatchStrategy, StepParallelStrategy

MIB, GIB = 2**20, 2**30

COLUMNS = {
    "layout": "what ranks share out; * is the config's own",
    "data": "data groups, each of which makes samples of its own",
    "slowest": "share of a one-GPU step that the slowest rank computes, a step after warm-up",
    "speed-up": "of a sample, warm-up included, by operations alone: messages cost nothing",
    "on link": "the same with the link's milliseconds",
    "samples": "throughput of all data groups, in one GPU's, at that speed-up",
    "MiB": "what a run counts a step after warm-up, over all ranks of a pipeline; with stages beside the computation",
    "+ MiB": "noise estimates on top of that, which ranks wait for",
    "link ms": "what comes in takes on the link in such a step, at the rank that gets most",
    "hidden": "whether the computation hides what travels beside it",
    "weights": "GiB of the denoiser's weights on a rank",
    "relay": "the same with warm-up in a relay",
    "buffers": "GiB of what a rank keeps of the others'",
    "age": "of the oldest inputs in steps, in the mean and at most",
    "over": "boundaries of stages behind one another",
}
"""Columns of the table, and what they mean."""


class Plan:
    """The layouts of one model for several numbers of GPUs.

    Args:
        module: The model; nothing of it is loaded.
        strategy: The config's strategy: its settings count, and its layout is marked.
        size: Height and width of the data's pictures in pixels, None where they are not known.
        link: What connects the ranks of a pipeline.
        step_ms: Milliseconds of a whole step on one GPU; None if it is not known.

    Raises:
        ValueError: The model does not tell what its denoiser is, or the size is not known.
    """

    def __init__(
        self,
        module: LightningModule,
        strategy: Any,
        size: tuple[int | None, int | None],
        link: Link,
        step_ms: float | None = None,
    ) -> None:
        height, width = module.picture_size(*size)
        if height is None or width is None:
            raise ValueError("The size of the pictures is not known: set height and width of the model or of the data.")
        example = module.example_call(height, width)
        if example is None:
            raise ValueError(module.why_unforeseen)
        self.module = module
        self.link = link
        self.step_ms = step_ms
        self.planner = Planner(*example, terms_of(strategy, module))
        self.left_out: dict[str, str] = {}
        """Why layouts that the number of ranks allows are not there, by their name."""
        self._own = _own_layout(strategy), getattr(strategy, "mode", "")
        self._size = height, width
        self._found: dict[Layout, list[Foreseen]] = {}

    def rows(self, gpus: int, num_nodes: int = 1) -> list[Foreseen]:
        """The layouts that fit so many GPUs: those of each number of ranks that a node is a multiple of.

        Args:
            gpus: GPUs in all.
            num_nodes: Machines that they are in; a pipeline does not reach over machines, its data groups do.

        Raises:
            ValueError: The machines do not have equally many.
        """
        if gpus % num_nodes:
            raise ValueError(f"{gpus} GPUs cannot be shared out evenly over {num_nodes} machines; give a multiple.")
        in_node = gpus // num_nodes
        found = []
        for ranks in (ranks for ranks in range(1, in_node + 1) if in_node % ranks == 0):
            for layout in [Layout()] if ranks == 1 else layouts_for(ranks, self.module.is_guided):
                found += [each.with_data(gpus // ranks) for each in self._foresee(layout)]
        return found

    def _foresee(self, layout: Layout) -> list[Foreseen]:
        if layout not in self._found:
            try:
                self._found[layout] = self.planner.foresee(layout)
            except ValueError as error:
                self._found[layout] = []
                self.left_out[layout_name(layout)] = str(error)
        return self._found[layout]

    def is_own(self, found: Foreseen) -> bool:
        """Whether a layout is that of the config."""
        layout, mode = self._own
        return replace(found.layout, data=1) == layout and (not found.mode or found.mode == mode)

    def describe(self, gpus: Sequence[int], num_nodes: int = 1) -> str:
        """The plan for people.

        Args:
            gpus: Numbers of GPUs in all.
            num_nodes: Machines that they are in.
        """
        module, work, link = self.module, self.planner.work(), self.link
        counts = module.num_inference_steps
        height, width = self._size
        flops, units = operations(work.flops), len(work.graph.units)
        lines = [
            f"model    {module.pretrained}, {width}x{height}, {str(module.torch_dtype).removeprefix('torch.')}",
            f"step     {flops} in {units} units, {work.weight_bytes / GIB:.3g} GiB of weights, "
            f"{work.estimate_bytes / MIB:.3g} MiB of noise estimate",
            f"samples  {', '.join(map(str, counts))} steps; {self._warm_ups()}",
            f"link     {link.waited_for / 1e9:g} GB/s where ranks wait, {link.beside / 1e9:g} beside the computation",
        ]
        if self.step_ms is not None:
            lines.append(f"one GPU  {self.step_ms:g} ms a step")
        cuts: dict[str, str] = {}
        for number in gpus:
            nodes = f" on {num_nodes} machines of {number // num_nodes}" if num_nodes > 1 else ""
            rows = self.rows(number, num_nodes)
            lines += ["", f"{number} GPU{'s' * (number > 1)}{nodes}", *self._table(rows)]
            cuts |= {found.name: _cut(found) for found in rows if found.cut}
        lines += ["", *(f"{name:9} {meaning}" for name, meaning in COLUMNS.items() if self._has(name))]
        if cuts:
            lines += ["", "Cuts: each stage's share of a one-GPU step, and the first of its modules", ""]
            width = max(map(len, cuts))
            lines += [f"{name:{width}}  {text}" for name, text in cuts.items()]
        if self.left_out:
            lines += ["", "Left out", *(f"{name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)

    def write(self, path: Path, gpus: Sequence[int], num_nodes: int = 1) -> None:
        """Writes the plan as a table of numbers, a row for each number of GPUs and layout.

        Args:
            path: The CSV file.
            gpus: Numbers of GPUs in all.
            num_nodes: Machines that they are in.
        """
        rows = [self._record(number, num_nodes, found) for number in gpus for found in self.rows(number, num_nodes)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def _record(self, gpus: int, num_nodes: int, found: Foreseen) -> dict[str, Any]:
        layout, on_link = found.layout, self._on_link(found)
        return {
            "gpus": gpus,
            "nodes": num_nodes,
            "layout": found.name,
            "is_own": self.is_own(found),
            "data": layout.data,
            "cfg": layout.cfg,
            "stages": layout.stages,
            "stride": layout.stride,
            "patches": layout.patches,
            "mode": found.mode,
            "parallel_steps": layout.steps,
            "shares": json.dumps([round(share, 6) for share in found.shares]),
            "slowest_share": max(found.shares),
            "speed_up": found.speed_up,
            "speed_up_on_link": on_link,
            "bytes_per_step": found.sent_bytes,
            "estimate_bytes_per_step": found.estimate_bytes,
            "bytes_beside": found.beside_bytes,
            "bytes_waited_for": found.waited_for_bytes,
            "link_ms": found.link_ms(self.link),
            "is_hidden": None if self.step_ms is None else found.is_hidden(self.link, self.step_ms),
            "weight_bytes": found.weight_bytes,
            "relay_weight_bytes": found.relay_bytes,
            "buffer_bytes": found.held_bytes,
            "mean_age": found.mean_age,
            "oldest": found.oldest,
            "boundaries": found.boundaries,
            "cut": json.dumps(found.cut) if found.cut else None,
        }

    def _on_link(self, found: Foreseen) -> float | None:
        return None if self.step_ms is None else found.speed_up_on(self.link, self.step_ms)

    def _has(self, column: str) -> bool:
        return self.step_ms is not None or column not in ("on link", "hidden")

    def _table(self, rows: Sequence[Foreseen]) -> list[str]:
        names = [name for name in COLUMNS if self._has(name)]
        lines = [names, *([self._cells(found)[name] for name in names] for found in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]

    def _cells(self, found: Foreseen) -> dict[str, str]:
        on_link = self._on_link(found)
        is_hidden = None if self.step_ms is None else found.is_hidden(self.link, self.step_ms)
        relay = found.relay_bytes
        return {
            "layout": ("* " if self.is_own(found) else "  ") + found.name,
            "data": str(found.layout.data),
            "slowest": f"{max(found.shares) / found.layout.stride:.1%}",
            "speed-up": f"{found.speed_up:.2f}",
            "on link": "" if on_link is None else f"{on_link:.2f}",
            "samples": f"{found.layout.data * (found.speed_up if on_link is None else on_link):.2f}",
            "MiB": _number(found.sent_bytes / MIB),
            "+ MiB": _number(found.estimate_bytes / MIB),
            "link ms": _number(found.link_ms(self.link), 2),
            "hidden": {None: "", True: "yes", False: "no"}[is_hidden],
            "weights": f"{found.weight_bytes / GIB:.2f}",
            "relay": "" if relay is None else f"{relay / GIB:.2f}",
            "buffers": _number(found.held_bytes / GIB, 2),
            "age": "exact" if found.oldest == 0 else f"{found.mean_age:.2g} to {found.oldest}",
            "over": str(found.boundaries) if found.boundaries else "",
        }

    def _warm_ups(self) -> str:
        terms = self.planner.terms
        exact = ", ".join(str(exact) for _, exact in terms.samples)
        refresh = "" if terms.refresh_every is None else f" and each {terms.refresh_every} after them"
        return (
            f"exact at the start: {exact} with stages{refresh}, {terms.patch_warm_up} with patches, "
            f"{terms.steps_warm_up} with steps at a time"
        )


def terms_of(strategy: Any, module: LightningModule) -> Terms:
    """The settings of a config that layouts are foreseen with; those of other strategies are the defaults.

    Args:
        strategy: The config's strategy.
        module: The model, whose step counts and noise schedule decide how long a warm-up lasts.
    """
    of_stages = strategy if isinstance(strategy, AsyncDiffStrategy) else AsyncDiffStrategy()
    samples = []
    for n in module.num_inference_steps:
        # a warm-up that drift ends lasts as long as it may
        most = span_of(of_stages.warm_up, noise_before(module, n)).most
        samples.append((n, n if most is None else min(n, most)))
    terms: dict[str, Any] = {}
    if isinstance(strategy, PatchStrategy):
        terms["patch_warm_up"] = strategy.warm_up
        if strategy.mode != "full_sync":
            terms |= {"mode": strategy.mode, "portion": strategy.portion}
    if isinstance(strategy, StepParallelStrategy):
        terms["steps_warm_up"] = strategy.warm_up
    return Terms(
        tuple(samples),
        refresh_every=of_stages.refresh_every,
        folded=of_stages.folded,
        cut=of_stages.cut,
        **terms,
    )


def _own_layout(strategy: Any) -> Layout | None:
    """The layout of a config's strategy; None where it has none yet, or one that is not foreseen."""
    is_known = isinstance(strategy, AsyncDiffStrategy | PatchStrategy | StepParallelStrategy)
    if not is_known or getattr(strategy, "layout", None) == "auto":
        return None
    names = ("stages", "stride", "cfg", "patches", "steps")
    return Layout(**{name: getattr(strategy, name) for name in names if hasattr(strategy, name)})


def _cut(found: Foreseen) -> str:
    stages = zip(found.shares, found.cut, strict=True)
    return " | ".join(f"{share:.0%} {names[0]}" for share, names in stages)


def _number(number: float, decimals: int = 1) -> str:
    return "" if number == 0 else f"{number:.0f}" if number >= 100 else f"{number:.{decimals}f}"
