"""Step latency and memory of full-size models, layout by layout, through the package's command.

Weights are random, since latency does not depend on them; prompts and pictures are made up, in the size of the run;
nothing is downloaded, scored or written but tables. Prints a Markdown table. Example, on a machine with 4 GPUs:

    python scripts/benchmark.py sdxl_n2 sd15_n2 --layouts 1 2 4 2x2 --devices 4 --csv rows.csv
    python scripts/benchmark.py sdxl_patch4 --layouts 1 p2 p4 2xp2 -- --trainer.strategy.init_args.mode full_sync

A layout is STAGES, STAGESs2 for stride 2, pPATCHES for patches, and 2x before it for a guidance batch that is split:
`1` is one GPU, `3s2` is 3 stages with stride 2, `2x2` is 2 stages for each half of the guidance batch, `2xp2` is 2
patches for each. Patches take mode and portion of a config with patches, else PatchStrategy's own. Layouts of as many
ranks are measured in the same processes, one after another. Everything behind `--` goes to the command as it is, such
as `-- --model.num_inference_steps 10 --trainer.strategy.init_args.warm_up 1`, for all layouts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from benchmark_inputs import made_up_data

from asyncdiff_pl.cli.overview import find_config
from asyncdiff_pl.parallel import Layout

COLUMNS = {
    "step, ms": "step_ms",
    "exact step, ms": "exact_step_ms",
    "asynchronous step, ms": "asynchronous_step_ms",
    "whole call, s": "seconds_a_sample",
    "peak memory of a rank, GiB": "peak_memory_gib",
    "exchanged, MiB a step": "mib_per_step",
}
"""Figures of the Markdown table, and their names in the CSV file."""

RANKS = Path(__file__).with_name("benchmark_ranks.py")

STRATEGIES = {
    "stages": "asyncdiff_pl.strategies.AsyncDiffStrategy",
    "patches": "asyncdiff_pl.strategies.PatchStrategy",
}
"""What runs each kind of layout, by the axis that it has."""

SHARED = ("warm_up", "capture", "timeout")
"""Settings that mean the same to both: they are kept where a config is run in a layout of the other kind."""

FINISHED = "finished"
"""Name of the file that stands in the log folder of a run when all its tables are there."""

FAILED = "-failed.txt"
"""What the name of the file that says why a run failed has in addition to that of its log folder."""


@dataclass(frozen=True)
class Job:
    """One layout of one config.

    Args:
        config: Name of the config.
        name: The layout, as it is asked for; empty for the config's own.
        layout: Which that is.
        ranks: Number of processes to start.
        arguments: The command's.
        folder: Log folder of the run.
    """

    config: str
    name: str
    layout: Layout
    ranks: int
    arguments: list[str]
    folder: Path


def main() -> None:
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="names of configs, sdxl_n2 say, or YAML files")
    parser.add_argument("--samples", type=int, default=2, help="samples of a pipeline; the first is not timed (2)")
    parser.add_argument("--layouts", nargs="+", default=[""], help="layouts of each config (default: its own)")
    parser.add_argument("--sequential", action="store_true", help="one GPU: the same as --layouts 1")
    parser.add_argument(
        "--devices", type=int, help="GPUs to fill with pipelines, each with samples of its own (default: one pipeline)"
    )
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--csv", type=Path, help="a table that rows are added to")
    parser.add_argument("--logs", type=Path, help="folder for the runs' logs (default: a temporary one)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run counts as stuck (600)")
    options = parser.parse_args(arguments)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="benchmark-"))
    names = ["1"] if options.sequential else options.layouts
    try:
        jobs = [make_job(config, name, options, overrides, logs) for config in options.configs for name in names]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"| config | layout | GPUs | steps | {' | '.join(COLUMNS)} |")
    print("|---" * (4 + len(COLUMNS)) + "|", flush=True)
    # the processes that are measured end with this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = 0
    for _, group in groupby(sorted(jobs, key=lambda job: -job.ranks), key=lambda job: job.ranks):
        for job, outcome in _measure(list(group), options.accelerator, options.limit, logs):
            failed += isinstance(outcome, str)
            _tell(job, outcome, options.csv)
    sys.exit(1 if failed else 0)


# -- what is run ------------------------------------------------------------------------------------------------------


def parse_layout(name: str) -> Layout:
    """The layout that `1`, `4`, `3s2`, `2x2`, `p4` or `2xp2` means."""
    found = re.fullmatch(r"(?:(\d)x)?(?:(\d)(?:s(\d))?|p(\d+))", name)
    if found is None:
        raise ValueError(
            f"There is no layout {name}; take 1, 2, 3s2 (stride 2), p2 (patches), 2x2 or 2xp2 (guidance batch split), "
            "say."
        )
    cfg, stages, stride, patches = (int(number or 1) for number in found.groups())
    return Layout(stages, stride, cfg, patches=patches)


def strategy_of(own: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The strategy that runs a layout, with a config's own settings as far as they go with it.

    Args:
        own: The config's strategy.
        layout: The layout.
    """
    has_patches = own["class_path"] == STRATEGIES["patches"]
    # one rank a half is the same in both
    axis = "patches" if layout.patches > 1 or (has_patches and layout.ranks_per_half == 1) else "stages"
    settings = own["init_args"]
    if own["class_path"] != STRATEGIES[axis]:
        settings = {name: settings[name] for name in SHARED if name in settings}
    axes = {"patches": layout.patches} if axis == "patches" else {"stages": layout.stages, "stride": layout.stride}
    return {"class_path": STRATEGIES[axis], "init_args": settings | axes | {"cfg": layout.cfg}}


def make_job(config: str, name: str, options: argparse.Namespace, overrides: list[str], logs: Path) -> Job:
    settings = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8"))
    strategy = settings["trainer"]["strategy"]
    if name:
        layout = parse_layout(name)
        settings["trainer"]["strategy"] = strategy_of(strategy, layout)
    else:
        axes = ("stages", "stride", "cfg", "patches")
        layout = Layout(**{axis: strategy["init_args"].get(axis, 1) for axis in axes})
    groups = options.devices // layout.pipeline_ranks if options.devices else 1
    if not groups:
        raise ValueError(f"{config} in the layout {name} needs {layout.pipeline_ranks} GPUs; give them as --devices.")
    ranks = groups * layout.pipeline_ranks
    plain = Path(config).stem
    folder = logs / plain / f"layout-{name or 'own'}"
    if (folder / "results.csv").exists():
        raise ValueError(f"{folder} holds a run; give another folder as --logs.")
    settings["model"]["init_args"] |= {"weights": "random", "variant": None}
    inputs = folder.with_name(f"{folder.name}-inputs")
    settings["data"] = made_up_data(settings, options.samples * groups, overrides, inputs)
    settings["trainer"] |= {"accelerator": options.accelerator, "devices": ranks}
    settings["trainer"]["logger"]["init_args"] |= {"save_dir": str(logs), "name": plain, "version": folder.name}
    settings |= {"clip_score": {"model": None}, "frame_writer": {"png": False, "animation": "none"}}
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{plain}-{folder.name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return Job(plain, name, layout, ranks, ["predict", "--config", str(file), *overrides], folder)


# -- running it -------------------------------------------------------------------------------------------------------


def _measure(jobs: list[Job], accelerator: str, limit: float, logs: Path) -> Iterator[tuple[Job, list[Any] | str]]:
    """Runs jobs of as many ranks in processes of their own; after a failure the rest in new ones.

    Yields:
        Each job with the rows of its results, or with what went wrong.
    """
    left = list(jobs)
    while left:
        plan = logs / "plan.json"
        runs = [{"arguments": job.arguments, "folder": str(job.folder)} for job in left]
        plan.write_text(json.dumps({"accelerator": accelerator, "runs": runs}), encoding="utf-8")
        output = logs / f"{left[0].config}-{left[0].folder.name}.log"
        threads = str(max(1, (os.cpu_count() or 1) // left[0].ranks))
        with output.open("w") as file:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *("--nproc_per_node", str(left[0].ranks), str(RANKS), str(plan)),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": threads, **os.environ},
                start_new_session=True,
            )
            try:
                while left and _wait(process, left[0], limit):
                    job = left.pop(0)
                    yield job, _rows(job)
                process.wait(60 if not left else 0.1)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if left:
            job = left.pop(0)
            told = job.folder.with_name(f"{job.folder.name}{FAILED}")
            reason = told.read_text(encoding="utf-8") if told.exists() else f"no result within {limit:g} s"
            yield job, f"{' '.join(reason.split())} ({output})"


def _wait(process: subprocess.Popen[bytes], job: Job, limit: float) -> bool:
    """Waits until a job has its results; False if its processes end without, or if it takes too long."""
    end = time.monotonic() + limit
    finished = job.folder / FINISHED
    while not finished.exists():
        if process.poll() is not None or time.monotonic() > end:
            return finished.exists()
        time.sleep(0.2)
    return True


def _rows(job: Job) -> list[dict[str, str]]:
    """The results of a job, one row for each step count."""
    times = list(_read(job.folder / "latency.csv"))
    rows = []
    for result in _read(job.folder / "results.csv"):
        own = [float(row["mean_ms"]) for row in times if row["steps"] == result["steps"]]
        exact = _exact_steps(job.layout, result, len(own))
        row = {
            "config": job.config,
            "layout": job.name or "own",
            "gpus": job.layout.pipeline_ranks,
            "steps": result["steps"],
            "step_ms": result["avg_step_latency_ms"],
            "exact_step_ms": _mean(own[:exact] if exact is not None else []),
            "asynchronous_step_ms": _mean(own[exact:] if exact is not None else []),
            "seconds_a_sample": result["avg_time"],
        }
        kept = ("peak_memory_gib", "mib_per_step", "timed_samples", "data_groups", "stages", "stride", "cfg", "warm_up")
        about = ("cut", "model", "device", "dtype", "torch", "diffusers")
        # which of them there are, is the strategy's
        more = {name: result.get(name, "") for name in ("patches", "mode", "portion")}
        own_columns = {name: result[name] for name in kept + about}
        rows.append({name: str(value) for name, value in row.items()} | own_columns | more)
    return rows


def _exact_steps(layout: Layout, result: dict[str, str], steps: int) -> int | None:
    """How many of the steps were computed exactly; None where that differs from sample to sample.

    Args:
        layout: The layout.
        result: A row of results.csv.
        steps: Steps of a sample.
    """
    if layout.ranks_per_half == 1 or result.get("mode") == "full_sync":
        return steps
    if result.get("mode") == "naive":
        return 0
    # by need, the warm-up of each sample may have another length
    return int(result["warm_up"]) if result["warm_up"].isdecimal() else None


def _tell(job: Job, outcome: list[dict[str, str]] | str, table: Path | None) -> None:
    if isinstance(outcome, str):
        print(f"| {job.config} | {job.name or 'own'} | {job.layout.pipeline_ranks} | failed: {outcome} |", flush=True)
        return
    for row in outcome:
        figures = " | ".join(f"{float(row[name]):.4g}" if row[name] else "" for name in COLUMNS.values())
        print(f"| {row['config']} | {row['layout']} | {row['gpus']} | {row['steps']} | {figures} |", flush=True)
        if table is not None:
            rows = [*_read(table), row] if table.exists() else [row]
            # a table of an earlier version may have fewer columns
            columns = dict.fromkeys(name for each in rows for name in each)
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(rows)


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.6g}" if values else ""


if __name__ == "__main__":
    main()
