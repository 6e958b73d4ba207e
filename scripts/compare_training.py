"""Compares ways to choose and weigh timesteps at equal wall-clock time: distance from real pictures against minutes.

    python scripts/compare_training.py measure comparison data/cifar10 --gpus 4 --keep true
    python scripts/compare_training.py verdict comparison data/cifar10 --gpus 4
    python scripts/compare_training.py throughput comparison data/cifar10 --batch_sizes '[128, 256, 512]'
    python scripts/compare_training.py report comparison

Each run trains `asyncdiff_pl.models.training.DDPM` in a Lightning Trainer, as `fit` does. The clock runs over training
steps with all that a method does in them; it begins after some steps, in which things are compiled, and stands still
while pictures are made and measured. At each mark pictures are made with the averaged weights and DDIM, and a row goes
to OUTPUT/runs*.csv; a run that has all its rows is not made again. One process a GPU; `--gpus 1/4` is one of four.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from shards import run_commands
from torch.utils.flop_counter import FlopCounterMode
from training_report import COLUMNS, THROUGHPUT_COLUMNS, append_row, read_rows, report
from training_runs import (
    RealDistance,
    Training,
    build_method,
    draw,
    network_folder,
    now,
    own_share,
    start_processes,
)
from training_verdict import verdict

from asyncdiff_pl.callbacks import WeightAverage

COMPARED = ("uniform", "min-snr", "p2", "speed", "speed-sampler", "uncertainty", "beta-policy", "adaptive")
"""What is compared if nothing else is said."""


class Clock(Callback):
    """Measures a run at marks of its training time.

    Args:
        minutes: The marks, rising.
        free_steps: Steps before the clock begins: the network is compiled in them.
        measure: Called at each mark with the mark, the seconds of training and the steps in them.
    """

    def __init__(self, minutes: Sequence[float], free_steps: int, measure: Callable[[float, float, int], None]) -> None:
        self.minutes = list(minutes)
        self.free_steps = free_steps
        self.measure = measure
        self._began: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Begins, goes on, or stands still while it is measured."""
        if self._began is None:
            if trainer.global_step >= self.free_steps:
                self._began = now()
            return
        # without waiting for the device but at marks: it is a few steps behind at most
        if time.perf_counter() - self._began < 60 * self.minutes[0]:
            return
        reached = now()
        self.measure(self.minutes.pop(0), reached - self._began, trainer.global_step - self.free_steps)
        self._began += now() - reached
        trainer.should_stop = not self.minutes


def measure(
    output: Path,
    data: Path,
    methods: Sequence[str] = COMPARED,
    seeds: Sequence[int] = (0, 1),
    minutes: Sequence[float] = (1.5, 3.0, 5.0),
    gpus: str = "1",
    runs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    warm_up: int = 500,
    free_steps: int = 20,
    pictures: int = 5000,
    sample_batch: int = 500,
    sample_steps: int = 20,
    features: str = "efficientnet-lite0",
    decay: float = 0.9999,
    compile: bool = True,
    capture: bool = False,
    tiny: bool = False,
    keep: bool = False,
    inductor_cache: Path | None = None,
) -> None:
    """Makes the runs that are not yet there, then prints the table and draws the plot.

    Args:
        output: Folder for rows, table and plot; what is there is not made again.
        data: See `path` of the data module `Cifar10`.
        methods: Names, some with settings: `adaptive:follow=0`.
        seeds: Seeds of weights and noises.
        minutes: Marks of training time, rising.
        gpus: How many GPUs, each with a process of its own; or `1/4`, the runs of the second of four alone.
        runs: Each process makes so many runs at most; null for all.
        batch_size: Pictures of a batch.
        learning_rate: Of Adam.
        warm_up: Steps in which the learning rate rises.
        free_steps: Steps before the clock begins.
        pictures: How many pictures are made at each mark.
        sample_batch: Pictures that are made at once.
        sample_steps: DDIM steps.
        features: Network that the distance is measured in; see `--frechet_distance.features` of `predict`.
        decay: Decay of the weights' average, at the end of its ramp.
        compile: Compile the network.
        capture: Record the network's passes as CUDA graphs.
        tiny: Train a tiny network in place of DDPM's, to try this out.
        keep: Export each run's network to OUTPUT/networks/METHOD-SEED, for `verdict` and `predict`.
        inductor_cache: Folder of compiled kernels that processes and runs share; null takes torch's own.
    """
    for name in methods:
        build_method(name)
    if list(minutes) != sorted(minutes) or not minutes or minutes[0] <= 0:
        raise ValueError(f"minutes is {[*minutes]}; give rising numbers above 0.")
    output.mkdir(parents=True, exist_ok=True)
    _share_kernels(inductor_cache)
    if start_processes(gpus):
        report(output)
        return
    mine, ending = own_share([(name, seed) for seed in seeds for name in methods], gpus)
    done = {(row["method"], int(row["seed"]), float(row["minutes"])) for row in read_rows(output)}
    left = [job for job in mine if (*job, minutes[-1]) not in done][:runs]
    distance = RealDistance(data, features, output) if left else None
    training = Training(data, batch_size, learning_rate, warm_up, compile, capture, tiny)

    def train(name: str, seed: int) -> None:
        module, datamodule = training.build(name, seed)
        average, began = WeightAverage(decay), f"{time.time():.0f}"

        def at_mark(mark: float, seconds: float, steps: int) -> None:
            assert distance is not None
            average.on_validation_epoch_start(trainer, module)
            found = distance(draw(module.network, module.scheduler, pictures, sample_batch, sample_steps))
            average.on_validation_epoch_end(trainer, module)
            row = (name, seed, mark, f"{seconds:.2f}", steps, steps * batch_size, found, pictures, distance.name, began)
            append_row(output / f"runs{ending}.csv", COLUMNS, dict(zip(COLUMNS, row, strict=True)))
            print(f"{name}, seed {seed}: {mark:g} min, {steps} steps, {distance.name} {found:.4g}", flush=True)

        trainer = training.trainer(average, Clock(minutes, free_steps, at_mark))
        trainer.fit(module, datamodule=datamodule)
        if keep:
            # the average has become the weights at the end
            module.export(network_folder(output, name, seed))

    for job in left:
        train(*job)
    if not ending:
        report(output)


def throughput(
    output: Path,
    data: Path,
    methods: Sequence[str] = ("uniform",),
    batch_sizes: Sequence[int] = (128,),
    steps: int = 200,
    free_steps: int = 20,
    compile: bool = True,
    capture: bool = False,
    tiny: bool = False,
    inductor_cache: Path | None = None,
) -> None:
    """Measures images a second of training, with all that a method does, at each batch size; on one GPU.

    Args:
        output: Folder of throughput.csv, which rows are added to.
        data: See `path` of the data module `Cifar10`.
        methods: Names, some with settings.
        batch_sizes: Pictures of a batch.
        steps: Steps that are timed; some methods do more in each 40th.
        free_steps: Steps before, in which things are compiled.
        compile: Compile the network.
        capture: Record the network's passes as CUDA graphs.
        tiny: Train a tiny network in place of DDPM's, to try this out.
        inductor_cache: Folder of compiled kernels that runs share; null takes torch's own.
    """
    output.mkdir(parents=True, exist_ok=True)
    _share_kernels(inductor_cache)
    for batch_size in batch_sizes:
        for name in methods:
            module, datamodule = Training(data, batch_size, compile=compile, capture=capture, tiny=tiny).build(name, 0)
            size = module.network.config.sample_size
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module.network(torch.zeros(1, 3, size, size), 0)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            pace = Pace(free_steps, steps)
            Training.trainer(WeightAverage(0.9999), pace).fit(module, datamodule=datamodule)
            images = batch_size * steps / pace.seconds
            memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            # the backward pass takes twice the forward pass
            rate = 3 * counter.get_total_flops() * images / 1e12
            row = (name, batch_size, compile, capture, steps, f"{pace.seconds:.3f}", f"{images:.0f}", f"{rate:.1f}")
            row = dict(zip(THROUGHPUT_COLUMNS, (*row, f"{memory:.1f}"), strict=True))
            append_row(output / "throughput.csv", THROUGHPUT_COLUMNS, row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


class Pace(Callback):
    """Times so many steps, after some that are not timed, and ends the run.

    Args:
        free_steps: Steps before.
        steps: Steps that are timed.
    """

    def __init__(self, free_steps: int, steps: int) -> None:
        self.free_steps = free_steps
        self.steps = steps
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Looks at the clock twice."""
        if trainer.global_step == self.free_steps:
            self.seconds = -now()
        elif trainer.global_step == self.free_steps + self.steps:
            self.seconds += now()
            trainer.should_stop = True


def _share_kernels(folder: Path | None) -> None:
    if folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())


if __name__ == "__main__":
    run_commands(measure, verdict, throughput, report, description=__doc__)
