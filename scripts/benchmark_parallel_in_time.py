r"""Seconds of the denoising loop with all steps solved together (ParaTAA), beside one step after the other.

DiT-XL/2 at 256 x 256 in 100 DDIM steps and Stable Diffusion 1.5 at 512 x 512 in 50, both with guidance, in their
published sizes with random weights; nothing is downloaded. For each model: plain diffusers on one rank, the same
captured and compiled, the guidance batch split over two ranks, and ParaTAA over each number of ranks. Prints a Markdown
table, and adds each row to a CSV file as soon as it is measured. On two GPUs:

    torchrun --nproc_per_node 2 scripts/benchmark_parallel_in_time.py --ranks 1 2 --compile blocks --csv rows.csv \
        --seconds 580

How many iterations ParaTAA takes depends on what the weights have learned, and these have learned nothing. So it is no
measurement but an assumption, 9 for DiT and 16 for Stable Diffusion (`assumed_iterations`): the tolerance is 0, and the
solver ends after so many. Each iteration then finishes one state alone, as the safeguard has it, and the next one
evaluates all others again. A sample that converges finishes several at a time and evaluates fewer states: the times are
upper bounds for so many iterations (`denoiser_calls`). With `--iterations` of all steps but one the result is that of
one step after the other.

The first loop of a row, in which every size of a batch is compiled and captured, is not timed; ParaTAA has a few sizes,
and compiling takes its time for each. Fewer ranks than there are run several times side by side; rank 0 tells of its
own. `--tiny` takes tiny models, which a CPU can run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from denoising_bench import Bench, measure_all, most, refuse
from denoising_jobs import PLAIN, Job, short_run
from denoising_models import Denoising, Kind
from denoising_report import Row, Table
from denoising_times import Run, figures, relative_deviation

from asyncdiff_pl.cli.overview import find_config
from asyncdiff_pl.parallel import Layout, Parallel, TimeParallel
from asyncdiff_pl.processes import die_with_parent

MIB = 2**20

ITERATIONS = {"dit": 9, "sd15": 16}
"""Iterations that are taken for granted, by model."""

FULL = {
    "dit": Kind("dit_parataa8", 100, (4, 32, 32), 4.0),
    "sd15": Kind("sd15_parataa4", 50, (4, 64, 64), 7.5),
}
"""Kinds by name; the settings of the solver are those of their configs."""

_TINY_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}
TINY = {
    "dit": Kind("dit_parataa8", 8, (4, 8, 8), 4.0, unet=_TINY_DIT | {"num_embeds_ada_norm": 10}),
    "sd15": Kind("sd15_parataa4", 8, (4, 16, 16), 7.5, {"pretrained": "tiny-sd"}),
}
"""The same kinds, tiny."""

COLUMNS = (
    *("model", "layout", "setting", "gpus", "cfg", "steps", "compile", "capture", "is_plain"),
    *("order", "window", "memory", "batch", "assumed_iterations", "iterations", "denoiser_calls"),
    *("loop_s", "over_eager", "over_sequential", "exact_step_ms", "solving_ms", "iteration_ms", "later_step_ms"),
    *("glue_ms", "host_ms", "mib_per_step", "peak_gib", "peak_of_eager", "deviation", "timed_loops", "setup_s"),
    *("row_s", "graphs", "refusal", "failure", "machine", "torch", "diffusers", "command"),
)
"""Columns of the CSV file.

As in scripts/denoising_report.py, where they are the same. `layout` is `1` for one step after the other, `2x1` for that
with the guidance batch split, and `parataaR` for R ranks. `order`, `window` and `memory` are the solver's, `batch` the
most inputs of one call of the denoiser. `assumed_iterations` were asked for and `iterations` computed; `denoiser_calls`
counts states that the denoiser was given, of which one step after the other takes `steps`. `over_sequential` is how
many times faster the loop is than on one GPU, one step after the other, in the same setting. `solving_ms` is the time
of the second step, in which all that are left are solved, `iteration_ms` an iteration's share of it, and
`later_step_ms` that of each step after it, in which the pipeline goes through what was solved. `mib_per_step` is what
all ranks send in a sample, for each of the steps that are solved. `deviation` is that of latents that may not have
converged.
"""

SHOWN = {
    "model": "model",
    "layout": "layout",
    "GPUs": "gpus",
    "setting": "setting",
    "steps": "steps",
    "iterations (assumed)": "assumed_iterations",
    "denoiser calls": "denoiser_calls",
    "loop, s": "loop_s",
    "× eager": "over_eager",
    "× sequential": "over_sequential",
    "exact step, ms": "exact_step_ms",
    "iteration, ms": "iteration_ms",
    "later step, ms": "later_step_ms",
    "MiB a step": "mib_per_step",
    "peak, GiB": "peak_gib",
    "deviation": "deviation",
}
"""Columns of the Markdown table."""


@dataclass(frozen=True)
class SolverJob(Job):
    """ParaTAA in one setting, on the ranks of its layout's time axis."""

    @property
    def is_plain(self) -> bool:
        """One rank that solves is no plain diffusers either."""
        return False


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    die_with_parent()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        jobs = plan(options, ranks)
        table = Table(options.csv, COLUMNS, SHOWN, compare)
    except ValueError as error:
        refuse(error, int(os.environ.get("RANK", "0")))
    measure_all(TimeBench, options, ranks, jobs, table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument(
        "--ranks", nargs="+", type=int, help="ranks that solve together (1, 2, 4 and 8, as far as they are there)"
    )
    parser.add_argument("--compile", nargs="+", choices=("none", "blocks", "full"), default=["none"])
    parser.add_argument("--batch", type=int, help="the most inputs of one call of the denoiser (default: no limit)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--iterations", type=int, help="iterations (default: 9 for dit, 16 for sd15)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed loops of each row, of which the median counts (3)"
    )
    parser.add_argument(
        "--patience", type=float, default=20, help="seconds after which a row is not repeated again (20)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    parser.add_argument("--seconds", type=float, help="ends the run after so many seconds; rows until then are kept")
    parser.add_argument("--csv", type=Path, help="a table that rows are added to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace, ranks: int) -> list[Job]:
    """The rows of one model: one step after the other, then ParaTAA. On a GPU all but the first are captured.

    Raises:
        ValueError: The ranks do not fit, or a number is below 1.
    """
    captures = options.device == "cuda"
    jobs: list[Job] = [PLAIN]
    jobs += [Job("1", Layout(), kind, captures) for kind in options.compile]
    if ranks % 2 == 0:
        jobs += [Job("2x1", Layout(cfg=2), kind, captures) for kind in options.compile]
    for number in options.ranks or [number for number in (1, 2, 4, 8) if ranks % number == 0]:
        TimeParallel(ranks=number, batch=options.batch, max_iterations=options.iterations)
        layout = Layout(time=number)
        layout.over(ranks)
        jobs += [SolverJob(f"parataa{number}", layout, kind, captures) for kind in options.compile]
    return list(dict.fromkeys(jobs))


class TimeBench(Bench):
    """Measures solvers, and what they compete with."""

    def kind(self, name: str) -> Kind:
        """A model."""
        return (TINY if self.options.tiny else FULL)[name]

    def build(self, kind: Kind) -> Denoising:
        """Builds a model's denoiser."""
        return Denoising(kind, self.world.device, self.dtype)

    def describe(self, name: str, job: Job, kind: Kind) -> Row:
        """Model, layout and setting."""
        options = self.options
        row = {
            "model": f"tiny {name}" if options.tiny else name,
            "layout": job.name,
            "setting": str(job),
            "gpus": job.ranks,
            "cfg": job.layout.cfg,
            "steps": options.steps or kind.steps,
            "compile": job.compile,
            "capture": "on" if job.capture else "off",
            "is_plain": int(job.is_plain),
        }
        if isinstance(job, SolverJob):
            solver = self._solver(kind, job)
            row |= {each: getattr(solver, each) for each in ("order", "window", "memory", "batch")}
            row["assumed_iterations"] = solver.max_iterations
        return row

    def measure(self, model: Denoising, job: Job, about: Row) -> Row:
        """Runs one row; every rank gets the figures of rank 0's pipeline."""
        world = self.world
        steps = self.options.steps or model.kind.steps
        self.begin()
        started = time.perf_counter()
        handle = None if job.is_plain else self._install(model, job)
        try:
            # a solver meets other sizes of batches in each iteration
            model.loop(steps if isinstance(job, SolverJob) else short_run(steps, 1))
            world.synchronize()
            setup = time.perf_counter() - started
            runs, latents = self.timed(model, handle, steps)
            row = {"setup_s": setup, "loop_s": statistics.median(run.seconds for run in runs)}
            own = {"peak_gib": world.peak(), "sent_mib": handle.bytes_per_step / MIB if handle else 0.0}
            ranks = world.gather(own)[: job.ranks]
            row["peak_gib"] = most(rank["peak_gib"] for rank in ranks)
            if handle is not None:
                row |= {"graphs": handle.num_graphs, "refusal": handle.capture_refusal}
            if isinstance(job, SolverJob):
                assert handle is not None and handle.solved is not None
                (iterations,), (calls,) = handle.solved.iterations, handle.solved.denoiser_calls
                row |= {"iterations": iterations, "denoiser_calls": calls} | figures_of_solving(runs, iterations)
                row["mib_per_step"] = sum(rank["sent_mib"] for rank in ranks)
            else:
                found = figures(runs, steps)
                row |= {each: found[each] for each in ("exact_step_ms", "timed_loops", "glue_ms", "host_ms")}
            if job.is_plain:
                self.reference = latents
            if self.reference is not None:
                row["deviation"] = relative_deviation(latents, self.reference)
            return row
        finally:
            if handle is not None:
                handle.remove()

    def _install(self, model: Denoising, job: Job) -> Parallel:
        settings: dict[str, Any] = {"cfg": job.layout.cfg}
        if isinstance(job, SolverJob):
            settings = {"time": self._solver(model.kind, job)}
        return model.install(self.groups_of(job.layout), compile=job.compile, capture=job.capture, **settings)

    def _solver(self, kind: Kind, job: SolverJob) -> TimeParallel:
        """The solver of a model's config, which never finds that a state has converged."""
        config = yaml.safe_load(Path(find_config(kind.config)).read_text(encoding="utf-8"))
        own = config["trainer"]["strategy"]["init_args"]
        assumed = next(ITERATIONS[name] for name in FULL if self.kind(name) == kind)
        return TimeParallel(
            ranks=job.layout.time,
            order=own.get("order"),
            window=own.get("window"),
            memory=own["memory"],
            tolerance=0.0,
            max_iterations=self.options.iterations or assumed,
            batch=self.options.batch,
        )


# -- figures -----------------------------------------------------------------------------------------------------------


def figures_of_solving(runs: list[Run], iterations: int) -> Row:
    """Medians over the runs: the first step is exact, in the second all that are left are solved.

    Args:
        runs: The loops.
        iterations: Iterations of each.
    """
    solving = statistics.median(run.denoiser_ms[1] for run in runs)
    return {
        "exact_step_ms": statistics.median(run.steps_ms[0] for run in runs),
        "solving_ms": solving,
        "iteration_ms": solving / iterations,
        "later_step_ms": statistics.median(statistics.fmean(run.steps_ms[2:]) for run in runs),
        "timed_loops": len(runs),
    }


def compare(row: Row, others: Iterable[Row]) -> Row:
    """What a row comes to beside one GPU that takes one step after the other.

    Args:
        row: The row.
        others: Rows of the same run that were measured before it.
    """
    if row.get("loop_s") is None:
        return {}
    found: Row = {}
    for other in [*others, row]:
        if other["model"] != row["model"] or other["layout"] != "1" or other.get("loop_s") is None:
            continue
        if other["is_plain"]:
            found["over_eager"] = other["loop_s"] / row["loop_s"]
            if other.get("peak_gib") and row.get("peak_gib"):
                found["peak_of_eager"] = row["peak_gib"] / other["peak_gib"]
        if all(other[name] == row[name] for name in ("compile", "capture")):
            found["over_sequential"] = other["loop_s"] / row["loop_s"]
    return found


if __name__ == "__main__":
    main()
