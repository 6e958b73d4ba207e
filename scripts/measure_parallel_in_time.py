"""Measures solving a sample's steps together: iterations, denoiser calls and how near to one step after the other.

    python scripts/measure_parallel_in_time.py measure solvers --shard 0/4   # several on a GPU, all in one folder
    python scripts/measure_parallel_in_time.py merge solvers                  # needs no GPU

tiny-sd and tiny-dit in 50 and 100 steps of DDIM, ParaTAA by order, memory and tolerance, and ParaDiGMS; then one thing
at a time is changed, to see what hinders the solver. `measure` appends a row for each sample, one setting after the
other; started again, it goes on where it was. `merge` writes samples.csv, solvers.md and solvers.png.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline
from parallel_in_time_rows import GUIDANCE, STEPS, Row, complete, gather, jobs_of, read_rows, tables, write_rows
from scene_samples import compute_exactly, generate_pictures, held_out, load
from shards import parse_shard, run_commands
from torch import Tensor

from asyncdiff_pl.data.scenes import CLASS_NAMES
from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.parallel import TimeParallel, parallelize


def measure(
    folder: Path,
    shard: str = "0/1",
    models: Sequence[Literal["tiny-sd", "tiny-dit"]] = ("tiny-sd", "tiny-dit"),
    steps: Sequence[int] = STEPS,
    samples: int = 8,
    batch: int | None = 256,
    only: str | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Solves samples in every setting, and compares their pictures with those of one step after the other.

    Args:
        folder: Where the rows go; all shards share it.
        shard: `0/4` runs settings 0, 4, 8 and so on, `1/4` settings 1, 5, 9.
        models: What is measured.
        steps: Numbers of denoising steps.
        samples: Pictures, all of one call: captions of held-out scenes, or one class after the other.
        batch: The most inputs, halves of the guidance batch counted, that one call of the denoiser gets.
        only: Settings whose names have this in them; null for all.
        device: Where everything runs.
        seed: Seed of the noise, which is the same in all settings.
    """
    index, number = parse_shard(shard)
    compute_exactly()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{index}of{number}.csv"
    done = complete(read_rows(folder), samples, seed)
    # what was cut off in the middle is not kept
    write_rows(path, [row for row in read_rows(folder, path.name) if row.job in done])
    jobs = [job for job in jobs_of(models, steps) if only is None or only in str(job)][index::number]
    pipes: dict[tuple[str, str], Any] = {}
    references: dict[tuple[Any, ...], Tensor] = {}
    for job in jobs:
        if job in done:
            continue
        model, setting = job.model, job.setting
        if (model, setting.dtype) not in pipes:
            pipes[model, setting.dtype] = prepare(model, setting.dtype, samples, device)
        pipe, generate = pipes[model, setting.dtype]
        guidance = GUIDANCE[model] if setting.guidance is None else setting.guidance
        key = (model, setting.dtype, job.steps, guidance)
        if key not in references:
            references[key] = generate(guidance, job.steps, seed)
        started = time.perf_counter()
        is_picard = setting.method == "picard"
        own = {} if is_picard else {"order": setting.order, "memory": setting.memory, "safeguard": setting.safeguard}
        common = {"tolerance": setting.tolerance, "window": setting.window, "batch": batch}
        # the sizes of batches are many, and each would be recorded
        handle = parallelize(
            pipe, time=TimeParallel(method=setting.method, **own, **common), simulate=True, capture=False
        )
        try:
            pictures = generate(guidance, job.steps, seed)
            solved = handle.solved
        finally:
            handle.remove()
        ratios = psnr(pictures, references[key]).tolist()
        counted = zip(solved.iterations, solved.denoiser_calls, solved.unfinished, ratios, strict=True)
        write_rows(path, [Row(job, seed, sample, *each) for sample, each in enumerate(counted)], append=True)
        means = sum(solved.iterations) / samples, sum(solved.denoiser_calls) / samples, sum(ratios) / samples
        seconds = time.perf_counter() - started
        print(f"{job}: {means[0]:.1f} iterations, {means[1]:.0f} calls, {means[2]:.1f} dB, {seconds:.1f} s", flush=True)


def merge(folder: Path) -> None:
    """Puts the shards' rows together: tables and a plot; needs neither models nor a GPU.

    Args:
        folder: Where the rows are, and where the report goes.
    """
    from plot_parallel_in_time import plot  # needs matplotlib, which measuring does not

    rows = {(row.job, row.seed, row.sample): row for row in read_rows(folder)}
    if not rows:
        raise ValueError(f"{folder} holds no samples_*of*.csv with rows; run `measure` into it first.")
    places = {job: at for at, job in enumerate(jobs_of(sorted(GUIDANCE, reverse=True), sorted(STEPS)))}
    ordered = sorted(rows.values(), key=lambda row: (places.get(row.job, len(places)), row.sample))
    write_rows(folder / "samples.csv", ordered)
    cells = gather(ordered)
    text = "\n".join(tables(cells))
    (folder / "solvers.md").write_text(text, encoding="utf-8")
    plot(cells, folder / "solvers.png")
    print(text)


Generate = Callable[[float, int, int], Tensor]
"""Makes all pictures, [B, 3, H, W], with a guidance scale in a number of steps from a seed."""


def prepare(model: str, dtype: str, samples: int, device: torch.device | str) -> tuple[Any, Generate]:
    """A pipeline with DDIM, and what makes its pictures."""
    if model == "tiny-sd":
        pipe = load(StableDiffusionPipeline, model, "float32", device)
        words = held_out(samples, device=device).captions
        argument, conditions = "prompt", [own[index % len(own)] for index, own in enumerate(words)]
    else:
        pipe = load(DiTPipeline, model, "float32", device)
        argument, conditions = "class_labels", [index % len(CLASS_NAMES) for index in range(samples)]
    if dtype != "float32":
        pipe.to(getattr(torch, dtype))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe, lambda guidance, steps, seed: generate_pictures(
        pipe, argument, conditions, guidance, steps, samples, seed
    )


if __name__ == "__main__":
    run_commands(measure, merge, description=__doc__)
