r"""Seconds of the denoising loop of full-size models, layout by layout, beside one GPU in the same run.

Weights are random, since latency does not depend on them; nothing is downloaded. One rank runs the loop first as plain
diffusers does, then captured and compiled; then come the layouts. Prints a Markdown table, adds each row to a CSV file
as soon as it is measured, and draws a plot. Example, on a machine with 4 GPUs:

    torchrun --nproc_per_node 4 scripts/benchmark_denoising.py --models svd sdxl sd21 animatediff \
        --layouts 1 2x1 2x2 4 --compile none blocks --balance measured --csv rows.csv --plot rows.png

A layout is STAGES, STAGESs2 for stride 2, pPATCHES, stepsSTEPS for several steps at a time or, for tensor parallelism,
which is here to be compared with, tRANKS; and 2x before it for a guidance batch that is split. One that needs fewer
ranks than there are runs several times side by side; rank 0 tells of its own. On two GPUs `--layouts steps2
--half-batch` measures one half of 2xsteps2. `--tiny` takes tiny models, which a CPU can run.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoising_jobs import Job, parse, plan, short_run, sized
from denoising_models import FULL, TINY, Denoising
from denoising_ranks import Clock, RankFailed, World
from denoising_report import Row, Table, plot, read_rows
from denoising_tensor_parallel import TensorParallel, tensor_mesh
from denoising_times import Marks, Run, figures, figures_of_rounds, relative_deviation
from torch.distributed.device_mesh import DeviceMesh

from asyncdiff_pl.callbacks.device_stats import device_name
from asyncdiff_pl.parallel import Groups, Layout, Parallel
from asyncdiff_pl.processes import die_with_parent

MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, __doc__)
    die_with_parent()
    ranks, kinds = int(os.environ.get("WORLD_SIZE", "1")), TINY if options.tiny else FULL
    try:
        jobs = plan(options, ranks)
        for name in options.models:
            sized(kinds[name], options.latents, options.half_batch)
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


# -- what is measured -------------------------------------------------------------------------------------------------


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
        self._meshes: dict[tuple[int, int], DeviceMesh] = {}
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
        kind = sized((TINY if self.options.tiny else FULL)[name], self.options.latents, self.options.half_batch)
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
            "model": " ".join(
                ["tiny"] * options.tiny
                + [name]
                + ([options.latents] if options.latents else [])
                + ["half batch"] * options.half_batch
            ),
            "layout": job.name,
            "setting": str(job),
            "gpus": job.ranks,
            "stages": layout.stages,
            "stride": layout.stride,
            "patches": layout.patches,
            "tensor": job.tensor,
            "steps_at_a_time": layout.steps,
            "cfg": layout.cfg,
            "steps": options.steps or own_steps,
            "warm_up": options.warm_up if job.is_asynchronous else None,
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
        # a rank in relay, or with a share of each layer, never holds the weights of the others
        model.denoiser.to("cpu" if job.warm_up_mode == "relay" or job.tensor > 1 else world.device)
        self._empty()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        shards = self._split(model, job) if job.tensor > 1 else None
        handle = None if job.is_plain else self._install(model, job)
        try:
            model.loop(short_run(steps, options.warm_up, job.layout.steps))
            world.synchronize()
            setup = time.perf_counter() - started
            runs, latents = self._timed(model, handle, steps)
            exact = handle.exact_steps if handle and job.is_asynchronous else steps
            if job.layout.steps > 1:
                row = figures_of_rounds(runs, options.warm_up, job.layout.steps)
                assert row["exact_steps"] == exact
            else:
                row = figures(runs, exact, job.layout.stride)
            row |= {"setup_s": setup, "loop_s": statistics.median(run.seconds for run in runs)}
            own = {"peak_gib": world.peak(), "slowest_ms": row.pop("last_ms", None)}
            own["exposed_ms"] = getattr(handle, "exposed_ms", None)
            sender = shards or handle
            sent = {"sent_mib": sender.bytes_per_step / MIB if sender else 0.0}
            ranks = world.gather(own | sent)[: job.ranks]
            row |= {name: _most(rank[name] for rank in ranks) for name in own}
            if handle is not None:
                row |= _describe(handle, job.layout)
            if shards is not None:
                row["split_share"] = shards.share
            if job.layout.patches > 1 or job.layout.steps > 1 or shards is not None:
                # each rank knows what it sends itself
                row["mib_per_step"] = sum(rank["sent_mib"] for rank in ranks)
            if row["exposed_ms"] is None and row["slowest_ms"] is not None:
                row["exposed_ms"] = row["asynchronous_step_ms"] - row["slowest_ms"]
            if job.is_plain:
                self._reference = latents
            if self._reference is not None:
                row["deviation"] = relative_deviation(latents, self._reference)
            wanted = options.whole_pipeline
            if wanted is not None and (job.is_plain or not wanted or job.name in wanted):
                row["pipeline_s"] = self._whole(model, steps, job.layout.steps)
            return row
        finally:
            if handle is not None:
                handle.remove()
            if shards is not None:
                shards.remove()

    def _split(self, model: Denoising, job: Job) -> TensorParallel:
        axes = job.tensor, job.layout.cfg
        if axes not in self._meshes:
            self._meshes[axes] = tensor_mesh(self.world.device, *axes)
        shards = TensorParallel(model.denoiser, self._meshes[axes])
        # what stays whole
        model.denoiser.to(self.world.device)
        return shards

    def _install(self, model: Denoising, job: Job) -> Parallel:
        layout, groups = job.layout, None
        if layout.pipeline_ranks > 1:
            if layout not in self._groups:
                # communicators are dear: each layout's are made once
                self._groups[layout] = Groups.build(layout.over(self.world.size))
            groups = self._groups[layout]
        if layout.patches > 1:
            settings: dict[str, Any] = {
                "patches": layout.patches,
                "mode": job.mode,
                "portion": job.portion,
                "compile": job.compile,
            }
        elif layout.steps > 1:
            settings = {"steps": layout.steps, "compile": job.compile}
        else:
            settings = {
                "stages": layout.stages,
                "stride": layout.stride,
                "compile": job.compile,
                "balance": job.balance,
                "warm_up_mode": job.warm_up_mode,
                "folded": job.folded,
            }
        return model.install(groups, cfg=layout.cfg, warm_up=self.options.warm_up, capture=job.capture, **settings)

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

    def _whole(self, model: Denoising, steps: int, at_a_time: int) -> float:
        """Seconds of the whole pipeline: the median of calls after a short one."""
        try:
            model.whole(short_run(steps, self.options.warm_up, at_a_time))
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
