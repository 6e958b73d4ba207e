r"""Seconds of the denoising loop of full-size models, layout by layout, beside one GPU in the same run.

Weights are random, since latency does not depend on them; nothing is downloaded. One rank runs the loop first as plain
diffusers does, then captured and compiled; then come the layouts. Prints a Markdown table, adds each row to a CSV file
as soon as it is measured, and draws a plot. Example, on a machine with 4 GPUs:

    torchrun --nproc_per_node 4 scripts/benchmark_denoising.py --models svd sdxl sd21 animatediff \
        --layouts 1 2x1 2x2 4 --compile none blocks --balance measured --csv rows.csv --plot rows.png

A layout is STAGES, STAGESs2 for stride 2, and 2x before it for a guidance batch that is split. One that needs fewer
ranks than there are runs several times side by side; rank 0 tells of its own. `--tiny` takes tiny models, which a CPU
can run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from benchmark import parse_layout
from denoising_models import FULL, TINY, Denoising
from denoising_ranks import Clock, RankFailed, World
from denoising_report import Row, Table, plot, read_rows
from denoising_times import Marks, Run, figures, relative_deviation

from asyncdiff_pl.callbacks.device_stats import device_name
from asyncdiff_pl.parallel import Groups, Layout, Parallel
from asyncdiff_pl.processes import die_with_parent

MIB = 2**20


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
    """

    name: str
    layout: Layout
    compile: str = "none"
    capture: bool = False
    balance: str = "operations"
    warm_up_mode: str = "replicated"

    @property
    def is_plain(self) -> bool:
        """Whether this is one rank with plain diffusers."""
        return self.layout.pipeline_ranks == 1 and self.compile == "none" and not self.capture

    def __str__(self) -> str:
        parts = [
            self.name,
            *([self.compile] if self.compile != "none" else []),
            *(["captured"] if self.capture else []),
        ]
        parts += [self.balance] if self.balance != "operations" else []
        parts += [self.warm_up_mode] if self.warm_up_mode != "replicated" else []
        return "plain diffusers" if self.is_plain else ", ".join(parts)


PLAIN = Job("1", Layout())


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    die_with_parent()
    ranks, kinds = int(os.environ.get("WORLD_SIZE", "1")), TINY if options.tiny else FULL
    try:
        jobs = plan(options, ranks)
        for name in options.models if options.whole_pipeline is not None else ():
            if not kinds[name].has_pipeline:
                raise ValueError(f"There is no whole pipeline of a tiny {name}; leave out --whole-pipeline.")
        table = Table(options.csv)
    except ValueError as error:
        if int(os.environ.get("RANK", "0")):
            # torchrun ends all ranks with the first: that one speaks
            time.sleep(5)
        sys.exit(f"error: {error}")
    world = World(options.device, ranks)
    clock = Clock(options.seconds, world, lambda: _draw(options))
    try:
        bench = Bench(world, options)
        for name in options.models:
            bench.measure_model(name, jobs, table)
        world.gather(None)
    except RuntimeError:
        if not clock.is_over:
            raise
        # another rank has left already, and this one is about to
        clock.wait()
    clock.stop()
    world.close()
    if world.rank == 0:
        _draw(options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument(
        "--layouts", nargs="+", default=["1"], help="layouts (1); plain diffusers on one rank comes by itself"
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
    parser.add_argument("--warm-up", type=int, default=3, help="exact steps (3)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
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
    parser.add_argument("--plot", type=Path, help="PNG to write; needs --csv and matplotlib")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    options = parser.parse_args(arguments)
    if options.plot is not None and options.csv is None:
        parser.error("--plot draws the rows of --csv; give that too")
    return options


# -- what is measured -------------------------------------------------------------------------------------------------


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
        layout = parse_layout(name)
        layout.over(ranks)
        settings = itertools.product(options.warm_up_mode, options.compile, captures, options.balance)
        for warm_up_mode, compile, capture, balance in settings:
            if layout.stages == 1:
                balance, warm_up_mode = "operations", "replicated"
            elif compile == "full":
                # takes a denoiser that is whole
                continue
            jobs.append(Job(name, layout, compile, capture, balance, warm_up_mode))
    # stable: settings in the order they were given in
    return list(dict.fromkeys(sorted(jobs, key=lambda job: job.layout.pipeline_ranks > 1)))


def short_run(steps: int, warm_up: int) -> int:
    """Steps of a loop that meets every phase of the schedule that a loop of `steps` meets, and no step more.

    After warm-up there are a fill, two buffers that are read in turn, and a last step; which buffer that reads depends
    on whether the number of steps is even.
    """
    short = warm_up + 5
    return min(steps, short + (steps - short) % 2)


class Bench:
    """Measures rows.

    Args:
        world: The ranks.
        options: The command's.
    """

    def __init__(self, world: World, options: argparse.Namespace) -> None:
        self.world, self.options = world, options
        self.dtype = torch.float16 if world.device.type == "cuda" else torch.float32
        self._groups: dict[Layout, Groups] = {}
        self._reference: torch.Tensor | None = None
        name = device_name(world.device)
        self._about = {
            "machine": f"{world.size} x {name}",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "command": _command(world.size),
        }

    def measure_model(self, name: str, jobs: Iterable[Job], table: Table) -> None:
        """Measures one model in all settings; a row that fails leaves the others alone."""
        kind = (TINY if self.options.tiny else FULL)[name]
        self._reference = None
        model: Denoising | None = None
        for job in jobs:
            started = time.perf_counter()
            try:
                # after a failure nobody knows what is left on the denoiser
                model = model or Denoising(kind, self.world.device, self.dtype, self.options.whole_pipeline is not None)
                found = self._measure(model, job)
                self.world.gather(None)
            except RankFailed as error:
                model, found = None, {"failure": str(error)}
            except Exception as error:
                text = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
                print(f"rank {self.world.rank}: {name}, {job}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                model, found = None, {"failure": self.world.tell_failure(text)}
            if self.world.rank == 0:
                table.add(self._row(name, job, kind.steps, found) | {"row_s": time.perf_counter() - started})
        del model
        self._empty()

    def _row(self, name: str, job: Job, own_steps: int, found: Row) -> Row:
        layout, options = job.layout, self.options
        row = {
            "model": f"tiny {name}" if options.tiny else name,
            "layout": job.name,
            "setting": str(job),
            "gpus": layout.pipeline_ranks,
            "stages": layout.stages,
            "stride": layout.stride,
            "cfg": layout.cfg,
            "steps": options.steps or own_steps,
            "warm_up": options.warm_up if layout.stages > 1 else None,
            "compile": job.compile,
            "capture": "on" if job.capture else "off",
            "balance": job.balance if layout.stages > 1 else None,
            "warm_up_mode": job.warm_up_mode if layout.stages > 1 else None,
            "is_plain": int(job.is_plain),
        }
        return row | found | self._about

    def _measure(self, model: Denoising, job: Job) -> Row:
        """Runs one row; every rank gets the figures of rank 0's pipeline."""
        options, world = self.options, self.world
        steps = options.steps or model.kind.steps
        # a rank in relay never holds the weights of the others
        model.denoiser.to("cpu" if job.warm_up_mode == "relay" else world.device)
        self._empty()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        handle = None if job.is_plain else self._install(model, job)
        try:
            model.loop(short_run(steps, options.warm_up))
            world.synchronize()
            setup = time.perf_counter() - started
            runs, latents = self._timed(model, handle, steps)
            exact = handle.exact_steps if handle and job.layout.stages > 1 else steps
            row = figures(runs, exact, job.layout.stride)
            row |= {"setup_s": setup, "loop_s": statistics.median(run.seconds for run in runs)}
            own = {"peak_gib": world.peak(), "slowest_ms": row.pop("last_ms", None)}
            own["exposed_ms"] = getattr(handle, "exposed_ms", None)
            ranks = world.gather(own)[: job.layout.pipeline_ranks]
            row |= {name: _most(rank[name] for rank in ranks) for name in own}
            if row["exposed_ms"] is None and row["slowest_ms"] is not None:
                row["exposed_ms"] = row["asynchronous_step_ms"] - row["slowest_ms"]
            if handle is not None:
                row |= _describe(handle, job.layout)
            if job.is_plain:
                self._reference = latents
            if self._reference is not None:
                row["deviation"] = relative_deviation(latents, self._reference)
            wanted = options.whole_pipeline
            if wanted is not None and (job.is_plain or not wanted or job.name in wanted):
                row["pipeline_s"] = self._whole(model, steps)
            return row
        finally:
            if handle is not None:
                handle.remove()

    def _install(self, model: Denoising, job: Job) -> Parallel:
        layout, groups = job.layout, None
        if layout.pipeline_ranks > 1:
            if layout not in self._groups:
                # communicators are dear: each layout's are made once
                self._groups[layout] = Groups.build(layout.over(self.world.size))
            groups = self._groups[layout]
        return model.install(
            groups,
            stages=layout.stages,
            stride=layout.stride,
            cfg=layout.cfg,
            warm_up=self.options.warm_up,
            compile=job.compile,
            capture=job.capture,
            balance=job.balance,
            warm_up_mode=job.warm_up_mode,
        )

    def _timed(self, model: Denoising, handle: Parallel | None, steps: int) -> tuple[list[Run], torch.Tensor]:
        """Timed loops, and the latents of the last one; one in which a graph was recorded is run again."""
        runs: list[Run] = []
        spent, tries = 0.0, 0
        while True:
            graphs = handle.num_graphs if handle else 0
            run, latents = self._timed_run(model, steps)
            tries += 1
            # all ranks stop after the same loop
            told = self.world.gather((handle is not None and handle.num_graphs > graphs, run.seconds))
            spent += max(seconds for _, seconds in told)
            if not any(is_new for is_new, _ in told) or tries > self.options.repeats:
                runs.append(run)
            if runs and (len(runs) >= self.options.repeats or spent > self.options.patience):
                return runs, latents

    def _timed_run(self, model: Denoising, steps: int) -> tuple[Run, torch.Tensor]:
        marks = Marks(self.world.device)
        self.world.gather(None)
        self.world.synchronize()
        started = time.perf_counter()
        latents = model.loop(steps, marks.add)
        self.world.synchronize()
        return marks.read(time.perf_counter() - started), latents

    def _whole(self, model: Denoising, steps: int) -> float:
        """Seconds of the whole pipeline: the median of calls after a short one."""
        try:
            model.whole(short_run(steps, self.options.warm_up))
            seconds: list[float] = []
            while len(seconds) < self.options.repeats and sum(seconds) <= self.options.patience:
                # the slowest rank's, so that all stop after the same call
                seconds.append(max(self.world.gather(model.whole(steps))))
            return statistics.median(seconds)
        finally:
            model.put_away()

    def _empty(self) -> None:
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


# -- figures -----------------------------------------------------------------------------------------------------------


def _describe(handle: Parallel, layout: Layout) -> Row:
    """What the handle tells of the cut, the messages and the graphs."""
    found: Row = {
        "mib_per_step": layout.cfg * handle.bytes_per_step / MIB,
        "cut": handle.cut_hash,
        "graphs": handle.num_graphs,
        "refusal": handle.capture_refusal,
    }
    if handle.costs:
        shares = [0.0] * layout.stages
        for unit in handle.costs:
            shares[unit.stage] += unit.share
        found |= {"slowest_share": max(shares), "fastest_share": min(shares)}
    return found


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _draw(options: argparse.Namespace) -> None:
    if options.plot is not None and options.csv.exists():
        plot(read_rows(options.csv), options.plot)


def _command(ranks: int) -> str:
    start = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    return f"{start} scripts/{Path(__file__).name} {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    main()
