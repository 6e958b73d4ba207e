"""What scripts/benchmark_denoising.py is asked to measure: its options, and the rows that they come to."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark import parse_layout
from denoising_models import FULL, TINY, Kind

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.patches.settings import PatchSettings


@dataclass(frozen=True)
class Job:
    """One layout in one setting.

    Args:
        name: The layout as it is asked for.
        layout: Which that is.
        compile: What torch compiles.
        capture: Whether steps are recorded as CUDA graphs.
        balance: What the cut balances.
        warm_up_mode: How exact steps are computed.
        folded: Whether a found cut's last stage may own both ends of the denoiser.
        mode: What patches see of one another after warm-up.
        portion: Share of the neighbours' rows that they see.
        tensor: Ranks that share each layer, for each rank of the layout.
    """

    name: str
    layout: Layout
    compile: str = "none"
    capture: bool = False
    balance: str = "operations"
    warm_up_mode: str = "replicated"
    folded: bool = False
    mode: str = "full_sync"
    portion: float = 1.0
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """Ranks that work on one sample."""
        return self.layout.pipeline_ranks * self.tensor

    @property
    def is_asynchronous(self) -> bool:
        """Whether steps after warm-up use what is a step old, or a round."""
        layout = self.layout
        return layout.stages > 1 or layout.steps > 1 or (layout.patches > 1 and self.mode != "full_sync")

    @property
    def is_plain(self) -> bool:
        """Whether this is one rank with plain diffusers."""
        return self.ranks == 1 and self.compile == "none" and not self.capture

    def __str__(self) -> str:
        parts = [
            self.name,
            *([self.compile] if self.compile != "none" else []),
            *(["captured"] if self.capture else []),
        ]
        parts += [self.balance] if self.balance != "operations" else []
        parts += [self.warm_up_mode] if self.warm_up_mode != "replicated" else []
        parts += ["folded"] if self.folded else []
        parts += [self.mode] if self.layout.patches > 1 else []
        parts += [f"portion {self.portion:g}"] if self.portion != 1 else []
        return "plain diffusers" if self.is_plain else ", ".join(parts)


PLAIN = Job("1", Layout())
TENSOR = re.compile(r"(?:(\d)x)?t([2-9]|[1-9]\d+)")
"""Layouts in which ranks share each layer: `t4`, and `2xt2` with a guidance batch that is split."""
STEPS = re.compile(r"(?:(\d)x)?steps([2-9]|[1-9]\d+)")
"""Layouts in which ranks compute steps of their own: `steps2`, and `2xsteps2` with a guidance batch that is split."""


def parse(
    arguments: list[str] | None, description: str | None = None, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.Namespace:
    """The command's options.

    Args:
        arguments: What follows the command; None takes the process's own.
        description: What `--help` begins with.
        parents: More options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, parents=parents
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["1"],
        help="layouts such as 2, 3s2, p2, t2, steps2, and 2x2, 2xp2, 2xt2, 2xsteps2 (1); plain diffusers on one rank "
        "comes by itself",
    )
    parser.add_argument("--compile", nargs="+", choices=("none", "blocks", "full"), default=["none"])
    parser.add_argument(
        "--capture",
        nargs="+",
        choices=("off", "on"),
        default=["on" if on_gpu else "off"],
        help="on where there is a GPU",
    )
    parser.add_argument("--balance", nargs="+", choices=("operations", "measured"), default=["operations"])
    parser.add_argument("--warm-up-mode", nargs="+", choices=("replicated", "relay"), default=["replicated"])
    parser.add_argument(
        "--folded",
        nargs="+",
        choices=("no", "yes"),
        default=["no"],
        help="whether a stage may own both ends of the denoiser (no)",
    )
    parser.add_argument(
        "--patch-mode",
        nargs="+",
        default=["full_sync"],
        metavar="MODE[:PORTION]",
        help="what patches see of one another, such as corrected_async_gn:0.3 (full_sync)",
    )
    parser.add_argument("--warm-up", type=int, default=3, help="exact steps (3)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument(
        "--latents",
        metavar="ROWSxCOLUMNS",
        help="size of the latents, an eighth of the picture's (default: the model's own)",
    )
    parser.add_argument(
        "--half-batch",
        action="store_true",
        help="one half of the guidance batch alone: what each half of the ranks does in the same layout with 2x before "
        "it, but for putting the halves together; for machines with half of its GPUs",
    )
    parser.add_argument(
        "--forward-chunk",
        type=int,
        metavar="FRAMES",
        help="frames whose feed-forward layers svd computes at a time (all)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed loops of each row, of which the median counts (3)"
    )
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds after which a row is not repeated again (20)"
    )
    parser.add_argument(
        "--whole-pipeline",
        nargs="*",
        metavar="LAYOUT",
        help="also time pipelines from input to pictures: plain diffusers and these layouts (all, if none is named)",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    parser.add_argument("--seconds", type=float, help="ends the run after so many seconds; rows until then are kept")
    parser.add_argument("--csv", type=Path, help="a table that rows are added to")
    parser.add_argument("--profile", type=Path, help="folder for a table of each row's kernels, as rank 0 runs them")
    parser.add_argument("--plot", type=Path, help="PNG to write; needs --csv and matplotlib")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    options = parser.parse_args(arguments)
    if options.half_batch and options.whole_pipeline is not None:
        parser.error("--half-batch is of the denoising loop alone; leave out --whole-pipeline")
    if options.plot is not None and options.csv is None:
        parser.error("--plot draws the rows of --csv; give that too")
    return options


def plan(options: argparse.Namespace, ranks: int) -> list[Job]:
    """The rows of one model, one rank first: the others are compared with it.

    Raises:
        ValueError: The ranks do not fit a layout, or a setting needs a GPU.
    """
    captures = [state == "on" for state in options.capture]
    if any(captures) and options.device == "cpu":
        raise ValueError("--capture on records CUDA graphs, and there is no GPU; take --capture off.")
    jobs = [PLAIN]
    for name in options.layouts:
        found = TENSOR.fullmatch(name)
        if found is not None:
            cfg, tensor = (int(number or 1) for number in found.groups())
            jobs += _tensor_jobs(Job(name, Layout(cfg=cfg), tensor=tensor), options.compile, captures, ranks)
            continue
        layout = _layout(name)
        layout.over(ranks)
        if layout.cfg == 2 and options.half_batch:
            raise ValueError(f"--half-batch leaves nothing to split, and --layouts has {name}; take {name[2:]}.")
        if layout.patches > 1:
            modes = [PatchSettings(layout, *_mode_and_portion(text)) for text in options.patch_mode]
            # the whole denoiser is nowhere
            kinds = [kind for kind in options.compile if kind != "full"]
            each = itertools.product(modes, kinds, captures)
            jobs += [Job(name, layout, kind, capture, mode=m.mode, portion=m.portion) for m, kind, capture in each]
            continue
        folds = [state == "yes" for state in options.folded]
        settings = itertools.product(options.warm_up_mode, options.compile, captures, options.balance, folds)
        for warm_up_mode, compile, capture, balance, folded in settings:
            if layout.stages == 1:
                balance, warm_up_mode, folded = "operations", "replicated", False
            elif compile == "full":
                # takes a denoiser that is whole
                continue
            jobs.append(Job(name, layout, compile, capture, balance, warm_up_mode, folded))
    # stable: settings in the order they were given in
    return list(dict.fromkeys(sorted(jobs, key=lambda job: job.ranks > 1)))


def _layout(name: str) -> Layout:
    """The layout of a name that has no tensor parallelism in it."""
    found = STEPS.fullmatch(name)
    if found is None:
        return parse_layout(name)
    cfg, steps = (int(number or 1) for number in found.groups())
    return Layout(cfg=cfg, steps=steps)


def _tensor_jobs(job: Job, compiles: list[str], captures: list[bool], ranks: int) -> list[Job]:
    """The rows of a layout in which ranks share each layer."""
    if ranks % job.ranks:
        raise ValueError(
            f"{job.name} takes cfg {job.layout.cfg} x tensor {job.tensor} = {job.ranks} ranks, which does not fit "
            f"{ranks}: start a multiple of {job.ranks}, or change the layout."
        )
    if "none" not in compiles:
        raise ValueError(
            f"{job.name} splits layers by torch's hooks, which are not compiled here, and --compile is "
            f"{' '.join(compiles)}: add none to it, or leave {job.name} out."
        )
    return [replace(job, capture=capture) for capture in captures]


def _mode_and_portion(text: str) -> tuple[Any, int, float]:
    """Arguments of `PatchSettings` for MODE or MODE:PORTION; warm-up is checked with them elsewhere."""
    mode, _, portion = text.partition(":")
    try:
        return mode, 1, float(portion or 1)
    except ValueError:
        raise ValueError(f"--patch-mode {text} has a portion that is no number; give MODE:0.3, say.") from None


def kind_of(name: str, options: argparse.Namespace) -> Kind:
    """A model in the size that is asked for.

    Raises:
        ValueError: There is none.
    """
    kind = (TINY if options.tiny else FULL)[name]
    return sized(kind, options.latents, options.half_batch, options.forward_chunk)


def sized(kind: Kind, latents: str | None, is_half: bool = False, forward_chunk: int | None = None) -> Kind:
    """A model with latents of another size, with one half of the guidance batch alone, or with smaller layers.

    Raises:
        ValueError: That is no size, or frames do not come in chunks of it.
    """
    if is_half:
        kind = replace(kind, is_half=True)
    if forward_chunk is not None:
        # guidance that changes over the frames is svd's
        if not isinstance(kind.guidance, tuple) or forward_chunk < 1 or kind.latents[0] % forward_chunk:
            raise ValueError(f"--forward-chunk is {forward_chunk}; it divides the frames of svd, and no other has it.")
        kind = replace(kind, forward_chunk=forward_chunk)
    if latents is None:
        return kind
    found = re.fullmatch(r"(\d+)x(\d+)", latents)
    if found is None:
        raise ValueError(f"--latents is {latents}; give ROWSxCOLUMNS, such as 128x128.")
    rows, columns = map(int, found.groups())
    size = {"height": 8 * rows, "width": 8 * columns}
    return replace(kind, latents=(*kind.latents[:-2], rows, columns), changes={**kind.changes, **size})


def short_run(steps: int, warm_up: int, at_a_time: int = 1) -> int:
    """Steps of a loop that meets every phase of the schedule that a loop of `steps` meets, and no step more.

    After warm-up there are a fill, two buffers that are read in turn, and a last step; which buffer that reads depends
    on whether the number of steps is even. Where steps are computed several at a time, there is a round in which all
    ranks send.

    Args:
        steps: Steps of the loop.
        warm_up: Exact steps.
        at_a_time: Steps of a round.
    """
    short = warm_up + max(5, at_a_time)
    return min(steps, short + (steps - short) % 2)
