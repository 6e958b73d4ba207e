r"""Memory and computing time of each rank of a layout, one after the other on one GPU: messages go nowhere.

Takes the options of `benchmark_denoising.py`, and the number of ranks that there would be:

    python scripts/benchmark_one_rank.py --ranks 4 --models svd --layouts 1 4 --balance measured \
        --warm-up-mode replicated relay --csv ranks.csv

A rank holds, records and computes what it does among the others; its messages are torch's `fake` backend's, which send
nothing and never fill a buffer. So its memory is the layout's, less what NCCL takes itself, and its times are those of
computing alone: what the layout takes at the least. What it computes with is partly whatever lay in its memory. Each
rank is a process of its own; the first one also measures rows of one rank, to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from unittest.mock import patch

import torch.distributed as dist
from benchmark_denoising import LayoutBench
from denoising_bench import refuse
from denoising_jobs import Job, kind_of, parse, plan
from denoising_models import Kind
from denoising_ranks import World
from denoising_report import COLUMNS, Row, Table
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # makes the backend known

from asyncdiff_pl.callbacks.device_stats import device_name
from asyncdiff_pl.parallel import recordings
from asyncdiff_pl.parallel.stages import pipeline, programs
from asyncdiff_pl.processes import die_with_parent

COMPARED = ("deviation", "over_eager", "over_compiled", "of_ideal", "peak_of_eager", "exposed_ms")
"""What a rank alone does not tell."""
RANK_COLUMNS = ("rank", "ranks", *(name for name in COLUMNS if name not in COMPARED))
SHOWN = {
    "model": "model",
    "rank": "rank",
    "setting": "setting",
    "GPUs": "gpus",
    "exact step, ms": "exact_step_ms",
    "later step, ms": "asynchronous_step_ms",
    "MiB a step": "mib_per_step",
    "peak, GiB": "peak_gib",
    "peak after the first steps, GiB": "later_peak_gib",
}


def main(arguments: list[str] | None = None) -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ranks", type=int, default=4, help="ranks that there would be (4)")
    own.add_argument("--rank", type=int, help="this one alone (default: one after the other)")
    options = parse(arguments, __doc__, [own])
    try:
        if options.whole_pipeline is not None:
            raise ValueError("A rank alone has no whole pipeline to time; leave out --whole-pipeline.")
        if options.rank is not None and options.rank not in range(options.ranks):
            raise ValueError(
                f"--rank is {options.rank}, and there are {options.ranks}; give one from 0 to {options.ranks - 1}."
            )
        jobs = plan(options, options.ranks)
        odd = [job.name for job in jobs if job.tensor > 1 or job.ranks not in (1, options.ranks)]
        if odd:
            raise ValueError(
                f"{odd[0]} is not for {options.ranks} ranks, or shares layers; take other --layouts or --ranks."
            )
        for name in options.models:
            kind_of(name, options)
        table = Table(options.csv, RANK_COLUMNS, SHOWN, lambda row, others: {})
    except ValueError as error:
        refuse(error, 0)
    if options.rank is None:
        for rank in range(options.ranks):
            command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
            subprocess.run([*command, "--rank", str(rank)], check=True)
        return
    die_with_parent()
    jobs = [job for job in jobs if job.ranks == options.ranks or options.rank == 0]
    world = Alone(options.device, options.ranks, options.rank)
    bench = OneRankBench(world, options)
    for name in options.models:
        bench.measure_model(name, jobs, table)
    world.close()


class Alone(World):
    """One rank of several, without the others.

    Args:
        device: `cuda` or `cpu`.
        size: Number of ranks.
        number: Which of them this is.
    """

    def __init__(self, device: str, size: int, number: int) -> None:
        super().__init__(device, 1)
        # it speaks for itself, whichever it is
        self.size, self.number, self.rank = size, number, 0
        dist.init_process_group("fake", store=dist.HashStore(), rank=number, world_size=size)
        record, cost = recordings.recorder_for, programs.agreed_costs
        self._patches = contextlib.ExitStack()
        for module, name, instead in (
            # messages that go nowhere can be in a recording
            (recordings, "recorder_for", lambda device, backend: record(device, None)),
            # weights come to this GPU as to that of a rank with NCCL
            (pipeline, "device_of_rank", lambda module: self.device),
            # nobody tells of costs: they are on disk, or measured here
            (programs, "agreed_costs", lambda *args: cost(*args[:-1])),
        ):
            self._patches.enter_context(patch.object(module, name, instead))

    def close(self) -> None:
        """Ends what only looks like connections."""
        self._patches.close()
        super().close()

    def _gather(self, value: object) -> list[object]:
        return [value] * self.size


class OneRankBench(LayoutBench):
    """Measures layouts on one of their ranks."""

    world: Alone

    def __init__(self, world: Alone, options: argparse.Namespace) -> None:
        super().__init__(world, options)
        self._about["machine"] = f"1 x {device_name(world.device)}"

    def describe(self, name: str, job: Job, kind: Kind) -> Row:
        """Model, layout, setting, and which rank it is."""
        about = {"rank": self.world.number if job.ranks > 1 else None, "ranks": self.world.size}
        return super().describe(name, job, kind) | about


if __name__ == "__main__":
    main()
