r"""Seconds of the denoising loop of full-size models, layout by layout, beside one GPU in the same run.

Weights are random, since latency does not depend on them; nothing is downloaded. One rank runs the loop first as plain
diffusers does, then captured and compiled; then come the layouts. Prints a Markdown table, adds each row to a CSV file
as soon as it is measured, and draws a plot. Example, on a machine with 4 GPUs:

    torchrun --nproc_per_node 4 scripts/benchmark_denoising.py --models svd sdxl sd21 animatediff \
        --layouts 1 2x1 2x2 4 --compile none blocks --balance measured --csv rows.csv --plot rows.png

A layout is STAGES, STAGESs2 for stride 2, pPATCHES, stepsSTEPS for several steps at a time or, for tensor parallelism,
which is here to be compared with, tRANKS; and 2x before it for a guidance batch that is split. One that needs fewer
ranks than there are runs several times side by side; rank 0 tells of its own. `--profile FOLDER` says what a step is
made of. On two GPUs `--layouts steps2
--half-batch` measures one half of 2xsteps2. `--tiny` takes tiny models, which a CPU can run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

from denoising_bench import Bench, measure_all, most, refuse
from denoising_jobs import Job, kind_of, parse, plan, short_run
from denoising_models import Denoising, Kind
from denoising_profile import profiled, summary, write_profile
from denoising_ranks import World
from denoising_report import Row, Table, plot, read_rows
from denoising_tensor_parallel import TensorParallel, tensor_mesh
from denoising_times import figures, figures_of_rounds, relative_deviation
from torch.distributed.device_mesh import DeviceMesh

from asyncdiff_pl.parallel import Layout, Parallel
from asyncdiff_pl.processes import die_with_parent

MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, __doc__)
    die_with_parent()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        jobs = plan(options, ranks)
        for name in options.models:
            kind = kind_of(name, options)
            if options.whole_pipeline is not None and not kind.has_pipeline:
                raise ValueError(f"There is no whole pipeline of a tiny {name}; leave out --whole-pipeline.")
        table = Table(options.csv)
    except ValueError as error:
        refuse(error, int(os.environ.get("RANK", "0")))
    measure_all(LayoutBench, options, ranks, jobs, table, lambda: _draw(options))


# -- what is measured -------------------------------------------------------------------------------------------------


class LayoutBench(Bench):
    """Measures layouts."""

    def __init__(self, world: World, options: argparse.Namespace) -> None:
        super().__init__(world, options)
        self._meshes: dict[tuple[int, int], DeviceMesh] = {}

    def kind(self, name: str) -> Kind:
        """A model in the size that is asked for."""
        return kind_of(name, self.options)

    def build(self, kind: Kind) -> Denoising:
        """Builds a model, and its pipeline if that is asked for."""
        return Denoising(kind, self.world.device, self.dtype, self.options.whole_pipeline is not None)

    def describe(self, name: str, job: Job, kind: Kind) -> Row:
        """Model, layout and setting."""
        layout, options = job.layout, self.options
        return {
            "model": " ".join(
                ["tiny"] * options.tiny
                + [name]
                + ([options.latents] if options.latents else [])
                + ["half batch"] * options.half_batch
                + ([f"in chunks of {options.forward_chunk}"] if options.forward_chunk else [])
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
            "steps": options.steps or kind.steps,
            "warm_up": options.warm_up if job.is_asynchronous else None,
            "compile": job.compile,
            "capture": "on" if job.capture else "off",
            "balance": job.balance if layout.stages > 1 else None,
            "warm_up_mode": job.warm_up_mode if layout.stages > 1 else None,
            "is_plain": int(job.is_plain),
        }

    def measure(self, model: Denoising, job: Job, about: Row) -> Row:
        """Runs one row; every rank gets the figures of rank 0's pipeline."""
        options, world = self.options, self.world
        steps = options.steps or model.kind.steps
        # a rank in relay, or with a share of each layer, never holds the weights of the others
        model.denoiser.to("cpu" if job.warm_up_mode == "relay" or job.tensor > 1 else world.device)
        self.begin()
        started = time.perf_counter()
        shards = self._split(model, job) if job.tensor > 1 else None
        handle = None if job.is_plain else self._install(model, job)
        try:
            model.loop(short_run(steps, options.warm_up, job.layout.steps))
            world.synchronize()
            setup = time.perf_counter() - started
            peak_of_setup = world.take_peak()
            runs, latents = self.timed(model, handle, steps)
            exact = handle.exact_steps if handle and job.is_asynchronous else steps
            if job.layout.steps > 1:
                row = figures_of_rounds(runs, options.warm_up, job.layout.steps)
                assert row["exact_steps"] == exact
            else:
                row = figures(runs, exact, job.layout.stride)
            row |= {"setup_s": setup, "loop_s": statistics.median(run.seconds for run in runs)}
            later = world.take_peak()
            own = {"peak_gib": most([peak_of_setup, later]), "later_peak_gib": later}
            own["slowest_ms"] = row.pop("last_ms", None)
            own["exposed_ms"] = getattr(handle, "exposed_ms", None)
            sender = shards or handle
            sent = {"sent_mib": sender.bytes_per_step / MIB if sender else 0.0}
            ranks = world.gather(own | sent)[: job.ranks]
            row |= {name: most(rank[name] for rank in ranks) for name in own}
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
                self.reference = latents
            if self.reference is not None:
                row["deviation"] = relative_deviation(latents, self.reference)
            if options.profile is not None:
                self._profile(model, about, short_run(steps, options.warm_up, job.layout.steps))
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
        layout = job.layout
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
        common = {"cfg": layout.cfg, "warm_up": self.options.warm_up, "capture": job.capture}
        return model.install(self.groups_of(layout), **common, **settings)

    def _profile(self, model: Denoising, about: Row, steps: int) -> None:
        """Says what a step is made of, and writes it down: rank 0's, while all ranks run."""

        def loop() -> None:
            model.loop(steps)
            self.world.synchronize()

        self.world.gather(None)
        if self.world.rank:
            loop()
            return
        kernels = profiled(loop, self.world.device)
        # of one rank that is measured alone, too
        rank = "" if about.get("rank") is None else f", rank {about['rank']}"
        name = f"{about['model']}, {about['setting']}{rank}"
        # the table is on the other one
        print(f"{name}: {summary(kernels, steps)}", file=sys.stderr, flush=True)
        write_profile(self.options.profile, name, kernels, steps)

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


def _draw(options: argparse.Namespace) -> None:
    if options.plot is not None and options.csv.exists():
        plot(read_rows(options.csv), options.plot)


if __name__ == "__main__":
    main()
