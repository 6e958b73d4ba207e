"""What the commands of `compare_training.py` share: methods by name, a run's module and trainer, pictures, distance."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn

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

TINY = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (), "dropout": 0.0}
"""A network that a CPU trains."""

FOREVER = 10**9
"""Steps that no run reaches: a callback ends it."""


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


@dataclass(frozen=True)
class Training:
    """What all runs have in common.

    Args:
        data: See `path` of the data module `Cifar10`.
        batch_size: Pictures of a batch.
        learning_rate: Of Adam.
        warm_up: Steps in which the learning rate rises.
        compile: Compile the network.
        capture: Record its passes as CUDA graphs.
        tiny: A tiny network in place of DDPM's.
    """

    data: Path
    batch_size: int
    learning_rate: float = 2e-4
    warm_up: int = 500
    compile: bool = True
    capture: bool = False
    tiny: bool = False

    def build(self, method: str, seed: int) -> tuple[DDPM, LightningDataModule]:
        """The module and the data of a run."""
        torch._dynamo.reset()
        chosen = build_method(method)
        # after the method, which may have weights of its own: those of the network are the same for all methods
        seed_everything(seed, verbose=False)
        optimizer = Optimizer(self.learning_rate, 0.0, 0.999, self.warm_up, "constant")
        settings = {"compile": self.compile, "capture": self.capture, "channels_last": torch.cuda.is_available()}
        module = DDPM(**chosen, **settings, optimizer=optimizer, **(TINY if self.tiny else {}))
        return module, Cifar10(str(self.data), batch_size=self.batch_size, seed=seed)

    @staticmethod
    def trainer(*callbacks: Callback) -> Trainer:
        """A trainer like that of `configs/ddpm_cifar10.yaml`, which goes on until a callback stops it."""
        return Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            benchmark=True,
            max_steps=FOREVER,
            gradient_clip_val=1.0,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            log_every_n_steps=FOREVER,
        )


def now() -> float:
    """Seconds, after all that the GPU has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def own_share(jobs: Sequence[Any], gpus: str) -> tuple[list[Any], str]:
    """This process' part of all jobs, and the ending of its files' names.

    Args:
        jobs: All, in an order that does not change.
        gpus: `1`, for all of them, or `1/4`.
    """
    own, _, count = gpus.rpartition("/")
    return list(jobs[int(own or 0) :: int(count)]), own and f"-{own}"


def start_processes(gpus: str) -> bool:
    """Starts this command once for each GPU, if there are to be several, and waits for all.

    Args:
        gpus: Number of processes; with fewer GPUs several share one. `1/4` starts none.

    Returns:
        Whether it did.
    """
    if "/" in gpus or int(gpus) == 1:
        return False
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    visible, places = devices.split(","), range(int(gpus))
    children = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--gpus", f"{place}/{gpus}"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible[place % len(visible)]},
        )
        for place in places
    ]
    failed = [place for place, child in zip(places, children, strict=True) if child.wait()]
    if failed:
        raise RuntimeError(f"The processes of GPUs {failed} failed; their messages stand above.")
    return True


@torch.no_grad()
def draw(network: nn.Module, scheduler: Any, number: int, batch: int, steps: int, compile: bool = False) -> Tensor:
    """Pictures [number, 3, H, W], uint8, of seeds from 0 up; in bfloat16 on a GPU.

    Args:
        network: The network, which is copied.
        scheduler: A `RespacedScheduler`, or another for DDIM's steps.
        number: How many.
        batch: Made at once.
        steps: Denoising steps.
        compile: Compile the network.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if network.device.type == "cuda":
        network.to(torch.bfloat16, memory_format=torch.channels_last)
    if compile:
        network.compile()
    pipeline = UnconditionalPipeline(network, scheduler)
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


def network_folder(output: Path, method: str, seed: int) -> Path:
    """Where a run's network is kept."""
    return output / "networks" / f"{method.replace(':', '-')}-{seed}"
