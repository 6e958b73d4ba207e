"""What the benchmarks of denoising loops share: rows that are measured model by model, on ranks that end together."""

from __future__ import annotations

import argparse
import gc
import inspect
import shlex
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from denoising_jobs import Job
from denoising_models import Denoising, Kind
from denoising_ranks import Clock, RankFailed, World
from denoising_report import Row, Table
from denoising_times import Marks, Run

from asyncdiff_pl.callbacks.device_stats import device_name
from asyncdiff_pl.parallel import Groups, Layout, Parallel


class Bench(ABC):
    """Measures rows.

    Args:
        world: The ranks.
        options: The command's.
    """

    def __init__(self, world: World, options: argparse.Namespace) -> None:
        self.world, self.options = world, options
        self.dtype = torch.float16 if world.device.type == "cuda" else torch.float32
        self.reference: torch.Tensor | None = None
        """Latents that plain diffusers made with the model in work, as far as it came to that."""
        self._groups: dict[Layout, Groups] = {}
        self._about = {
            "machine": f"{world.size} x {device_name(world.device)}",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "command": _command(Path(inspect.getfile(type(self))).name, world.num_processes),
        }

    @abstractmethod
    def kind(self, name: str) -> Kind:
        """A model as it is to be measured."""

    @abstractmethod
    def build(self, kind: Kind) -> Denoising:
        """Builds a model on the device."""

    @abstractmethod
    def describe(self, name: str, job: Job, kind: Kind) -> Row:
        """What is known of a row before it is measured."""

    @abstractmethod
    def measure(self, model: Denoising, job: Job, about: Row) -> Row:
        """Runs one row, of which `describe` told what is known; every rank gets the figures of rank 0's pipeline."""

    def measure_model(self, name: str, jobs: Iterable[Job], table: Table) -> None:
        """Measures one model in all settings; a row that fails leaves the others alone."""
        kind = self.kind(name)
        self.reference = None
        model: Denoising | None = None
        for job in jobs:
            started = time.perf_counter()
            about = self.describe(name, job, kind)
            try:
                # after a failure nobody knows what is left on the denoiser
                model = model or self.build(kind)
                found = self.measure(model, job, about)
                self.world.gather(None)
            except RankFailed as error:
                model, found = None, {"failure": str(error)}
            except Exception as error:
                text = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
                print(f"rank {self.world.rank}: {name}, {job}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                model, found = None, {"failure": self.world.tell_failure(text)}
            if self.world.rank == 0:
                row = about | found | self._about
                table.add(row | {"row_s": time.perf_counter() - started})
        del model
        self._empty()

    def groups_of(self, layout: Layout) -> Groups | None:
        """The process groups of a layout in this world; None for one rank alone. All ranks must ask."""
        if layout.pipeline_ranks == 1:
            return None
        if layout not in self._groups:
            # communicators are dear: each layout's are made once
            self._groups[layout] = Groups.build(layout.over(self.world.size))
        return self._groups[layout]

    def timed(self, model: Denoising, handle: Parallel | None, steps: int) -> tuple[list[Run], torch.Tensor]:
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

    def begin(self) -> None:
        """Begins to look for the peak of a row's memory, with nothing on the device but what is needed."""
        self._empty()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _empty(self) -> None:
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_all(
    make: Callable[[World, argparse.Namespace], Bench],
    options: argparse.Namespace,
    ranks: int,
    jobs: list[Job],
    table: Table,
    at_end: Callable[[], Any] = lambda: None,
) -> None:
    """Measures all models on all ranks, until the time is up.

    Args:
        make: Makes what measures.
        options: The command's: `models`, `device`, `seconds`, and what `make` needs.
        ranks: Ranks that were started.
        jobs: The rows of one model.
        table: Where rows go.
        at_end: What rank 0 does in the end.
    """
    world = World(options.device, ranks)
    clock = Clock(options.seconds, world, at_end)
    try:
        bench = make(world, options)
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
        at_end()


def most(values: Iterable[float | None]) -> float | None:
    """The largest of those that were measured; None if none was."""
    return max((value for value in values if value is not None), default=None)


def refuse(error: ValueError, rank: int) -> NoReturn:
    """Ends the command with a sentence, said by the first rank."""
    if rank:
        # torchrun ends all ranks with the first: that one speaks
        time.sleep(5)
    sys.exit(f"error: {error}")


def _command(script: str, num_processes: int) -> str:
    start = f"torchrun --nproc_per_node {num_processes}" if num_processes > 1 else "python"
    return f"{start} scripts/{script} {shlex.join(sys.argv[1:])}"
