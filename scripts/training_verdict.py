"""The verdict over trained networks: ancestral sampling, as DDPMs are judged, with more pictures than on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from training_report import VERDICT_COLUMNS, append_row, best_methods, read_rows, read_verdict, report
from training_runs import RealDistance, draw, network_folder, own_share, start_processes

from asyncdiff_pl.sampling.respaced import RespacedScheduler, Variance

ALWAYS = "uniform"
"""What the others are held against."""


def verdict(
    output: Path,
    data: Path,
    methods: Sequence[str] | None = None,
    best: int = 2,
    gpus: str = "1",
    pictures: int = 10_000,
    sample_steps: int = 100,
    variance: Variance = "fixed_small",
    sample_batch: int = 500,
    features: str = "efficientnet-lite0",
    compile: bool = True,
) -> None:
    """Makes pictures with the networks that `measure --keep true` left, by DDPM's steps, and measures their distance.

    Args:
        output: Folder that `measure` wrote to; rows go to OUTPUT/verdict*.csv, and what is there is not made again.
        data: See `path` of the data module `Cifar10`.
        methods: Names; null takes uniform and the best others at the last mark.
        best: So many others.
        gpus: How many GPUs, each with a process of its own; or `1/4`, the networks of the second of four alone.
        pictures: How many pictures.
        sample_steps: Steps of ancestral sampling, evenly spaced over the training's timesteps.
        variance: Of the noise that each step adds. With few steps `fixed_large`, which the configs train for 1000 of
            them, leaves more noise in a picture than the network is told of, and hides what networks differ in.
        sample_batch: Pictures that are made at once.
        features: Network that the distance is measured in.
        compile: Compile the networks.
    """
    if start_processes(gpus):
        report(output)
        return
    rows = read_rows(output)
    last = max((float(row["minutes"]) for row in rows), default=0.0)
    chosen = [ALWAYS, *best_methods(rows, best, ALWAYS)] if methods is None else methods
    runs = {(row["method"], int(row["seed"])) for row in rows if float(row["minutes"]) == last}
    # seed by seed, so that one that is cut off leaves methods to compare
    jobs = [
        (name, seed)
        for seed in sorted({seed for _, seed in runs})
        for name in chosen
        if (name, seed) in runs and network_folder(output, name, seed).is_dir()
    ]
    if not jobs:
        raise ValueError(
            f"{output} keeps no network of {', '.join(chosen)}; run `measure` with `--keep true` in it first."
        )
    mine, ending = own_share(jobs, gpus)
    done = {
        (row["method"], int(row["seed"]))
        for row in read_verdict(output)
        if (int(row["sample_steps"]), row["variance"], int(row["pictures"])) == (sample_steps, variance, pictures)
    }
    left = [job for job in mine if job not in done]
    distance = RealDistance(data, features, output) if left else None
    for name, seed in left:
        assert distance is not None
        torch._dynamo.reset()
        folder = network_folder(output, name, seed)
        network = UNet2DModel.from_pretrained(folder / "unet").to(distance.device)
        own = DDPMScheduler.from_pretrained(folder / "scheduler")
        scheduler = RespacedScheduler.like(own, sampler="ddpm", variance_type=variance)
        found = distance(draw(network, scheduler, pictures, sample_batch, sample_steps, compile))
        row = (name, seed, last, sample_steps, variance, pictures, found, distance.name)
        append_row(output / f"verdict{ending}.csv", VERDICT_COLUMNS, dict(zip(VERDICT_COLUMNS, row, strict=True)))
        print(f"{name}, seed {seed}: {distance.name} {found:.4g}", flush=True)
    if not ending:
        report(output)
