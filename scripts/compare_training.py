"""Compares ways to choose and weigh timesteps at equal wall-clock time: distance from real pictures against minutes.

    python scripts/compare_training.py measure comparison data/cifar10 --gpus 4
    python scripts/compare_training.py report comparison

Each run trains `asyncdiff_pl.models.training.DDPM` in a Lightning Trainer, as `fit` does. The clock runs over training
steps with all that a method does in them; it begins after some steps, in which things are compiled, and stands still
while pictures are made and measured. At each mark pictures are made with the averaged weights and DDIM, and a row goes
to OUTPUT/runs*.csv; a run that has all its rows is not made again. One process a GPU; `--gpus 1/4` is one of four.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from training_report import COLUMNS, append_row, read_rows, report

from asyncdiff_pl.callbacks import WeightAverage
from asyncdiff_pl.data.cifar10 import Cifar10
from asyncdiff_pl.data.image_sets import find_source
from asyncdiff_pl.metrics.frechet import FrechetDistance
from asyncdiff_pl.models.features import load_features
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.training import loss_weights, timesteps

METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "uniform": ("UniformTimesteps", {}, "UniformWeight"),
    "min-snr": ("UniformTimesteps", {}, "MinSNRWeight"),
    "p2": ("UniformTimesteps", {}, "P2Weight"),
    "speed": ("SpeeD", {}, "UniformWeight"),
    "speed-sampler": ("SpeeD", {"weigh": False}, "UniformWeight"),
    "uncertainty": ("UniformTimesteps", {}, "LearnedUncertainty"),
    "second-moment": ("LossSecondMoment", {}, "UniformWeight"),
    "beta-policy": ("BetaPolicy", {}, "UniformWeight"),
    "adaptive": ("AdaptiveTimesteps", {}, "UniformWeight"),
    "adaptive-min-snr": ("AdaptiveTimesteps", {}, "MinSNRWeight"),
}
"""Sampler of timesteps with its settings, and weight of losses, by the method's name."""

COMPARED = ("uniform", "min-snr", "p2", "speed", "speed-sampler", "uncertainty", "beta-policy", "adaptive")
"""What is compared if nothing else is said."""

TINY = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (), "dropout": 0.0}
"""A network that a CPU trains."""

FOREVER = 10**9
"""Steps that no run reaches: the clock ends it."""


def build_method(name: str) -> dict[str, Any]:
    """Sampler and weight of a method, as arguments of `DDPM`.

    Args:
        name: One of `METHODS`, with other settings of its sampler after a colon: `adaptive:follow=0,even_share=0.5`.
    """
    base, _, settings = name.partition(":")
    if base not in METHODS:
        raise ValueError(f"There is no method {base}; give some of {', '.join(METHODS)}.")
    sampler, own, weight = METHODS[base]
    own = own | {
        key: yaml.safe_load(value) for key, _, value in (part.partition("=") for part in settings.split(",")) if key
    }
    return {"timesteps": getattr(timesteps, sampler)(**own), "weight": getattr(loss_weights, weight)()}


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


def now() -> float:
    """Seconds, after all that the GPU has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
        tiny: Train a tiny network in place of DDPM's, to try this out.
        keep: Export each run's network to OUTPUT/networks/METHOD-SEED, for `predict`.
        inductor_cache: Folder of compiled kernels that processes and runs share; null takes torch's own.
    """
    output.mkdir(parents=True, exist_ok=True)
    if inductor_cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor_cache.resolve())
    for name in methods:
        build_method(name)
    own, _, count = gpus.rpartition("/")
    if not own and int(count) > 1:
        _start_processes(int(count))
        report(output)
        return
    jobs = [(name, seed) for seed in seeds for name in methods]
    mine = jobs[int(own or 0) :: int(count)]
    done = {(row["method"], int(row["seed"]), float(row["minutes"])) for row in read_rows(output)}
    left = [job for job in mine if (*job, minutes[-1]) not in done][:runs]
    distance = RealDistance(data, features, output)

    def train(name: str, seed: int) -> None:
        torch._dynamo.reset()
        method = build_method(name)
        # after the method, which may have weights of its own: those of the network are the same for all methods
        seed_everything(seed, verbose=False)
        optimizer = Optimizer(learning_rate, 0.0, 0.999, warm_up, "constant")
        settings = {"compile": compile, "channels_last": torch.cuda.is_available(), "optimizer": optimizer}
        module = DDPM(**method, **settings, **(TINY if tiny else {}))
        average = WeightAverage(decay)

        def at_mark(mark: float, seconds: float, steps: int) -> None:
            average.on_validation_epoch_start(trainer, module)
            found = distance(draw(module, pictures, sample_batch, sample_steps))
            average.on_validation_epoch_end(trainer, module)
            row = (name, seed, mark, f"{seconds:.2f}", steps, steps * batch_size, found, pictures, distance.name)
            append_row(output / f"runs{own and '-' + own}.csv", dict(zip(COLUMNS, row, strict=True)))
            print(f"{name}, seed {seed}: {mark:g} min, {steps} steps, {distance.name} {found:.4g}", flush=True)

        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            benchmark=True,
            max_steps=FOREVER,
            gradient_clip_val=1.0,
            callbacks=[average, Clock(minutes, free_steps, at_mark)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            log_every_n_steps=FOREVER,
        )
        trainer.fit(module, datamodule=Cifar10(str(data), batch_size=batch_size, seed=seed))
        if keep:
            # the average has become the weights at the end
            module.export(output / "networks" / f"{name.replace(':', '-')}-{seed}")

    for job in left:
        train(*job)
    if not own:
        report(output)


def _start_processes(count: int) -> None:
    """Starts this script once for each GPU, with this command's settings, and waits for all."""
    arguments, places = sys.argv[1:], range(count)
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--gpus", f"{place}/{count}"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(place)},
        )
        for place in places
    ]
    failed = [place for place, child in zip(places, children, strict=True) if child.wait()]
    if failed:
        raise RuntimeError(f"The processes of GPUs {failed} failed; their messages stand above.")


@torch.no_grad()
def draw(module: DDPM, number: int, batch: int, steps: int) -> Tensor:
    """Pictures [number, 3, H, W], uint8, of seeds from 0 up, by DDIM; in bfloat16 on a GPU.

    Args:
        module: Its network as it is now.
        number: How many.
        batch: Made at once.
        steps: DDIM steps.
    """
    network = copy.deepcopy(module.network).eval()
    if module.device.type == "cuda":
        network.bfloat16()
    pipeline = UnconditionalPipeline(network, module.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, number, batch):
        found = pipeline(list(range(start, min(start + batch, number))), steps, output_type="pt").images
        parts.append((found * 255).round().byte())
    return torch.cat(parts)


class RealDistance:
    """Fréchet distances from the training pictures, whose features' sums are kept in a file.

    Args:
        data: See the data module `Cifar10`.
        features: The network's name.
        output: Where the file goes.
    """

    def __init__(self, data: Path, features: str, output: Path) -> None:
        self.name, network = load_features(features)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.to(self.device)
        self._file = output / f"real-{self.name.replace('/', '-')}.pt"
        if not self._file.exists():
            read = find_source(data, "train")
            if read is None:
                raise ValueError(f"{data} holds no pictures; give CIFAR-10's folder.")
            metric = self._metric()
            metric.add_bytes(read(32).images, is_real=True)
            # of its own name: other processes write it as well
            part = self._file.with_suffix(f".{os.getpid()}")
            torch.save(metric.sums(), part)
            part.replace(self._file)

    def _metric(self) -> FrechetDistance:
        return FrechetDistance(self.network).to(self.device)

    def __call__(self, pictures: Tensor) -> float:
        """Distance of generated pictures [N, 3, H, W], uint8."""
        metric = self._metric()
        metric.merge(torch.load(self._file, weights_only=True))
        metric.add_bytes(pictures, is_real=False)
        return metric.compute()


if __name__ == "__main__":
    auto_cli([measure, report])
