"""What `test` measures, and the run of `predict` that does it: there is one way only in which pictures are made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace

from asyncdiff_pl.sampling.respaced import SamplerKind, Skip, Variance

GPU = ("gpu", "cuda")


@dataclass
class PictureTest:
    """How pictures of what was trained are made and measured; `fit` takes these settings and leaves them alone.

    Args:
        number: How many pictures are made.
        batch_size: Pictures that are made at once, on each device.
        sampler: `ddim`, or `ddpm`, which adds noise in each step (ancestral sampling).
        num_inference_steps: Number of denoising steps; a list measures each of them.
        eta: Noise of DDIM's steps, from 0 (none) to 1.
        skip: Which timesteps are taken: `linear` spaces them evenly, `quadratic` evenly in their square roots.
        variance: Variance of `ddpm`'s noise, `fixed_small` or `fixed_large`; null takes what was trained. With few
            steps `fixed_large` leaves noise in the pictures.
        features: Network of the Fréchet distance: `inception` for FID, `efficientnet-lite0`, a CLIP model or a file;
            see `predict --help`, frechet_distance.
        precision_features: Network of precision and recall, `vgg16-397923af.pth` say; null takes `features`.
        max_real: Takes so many real pictures; null takes all of them for the distance, 10,000 for precision and recall.
        dtype: Number format of the network; null takes float16 on a GPU and float32 elsewhere.
        seed: Seed of the pictures; each one's noise follows from it and from the picture's number.
        png: Write each picture as a file as well; all are in one `.npz` file.
    """

    number: int = 10_000
    batch_size: int = 500
    sampler: SamplerKind = "ddim"
    num_inference_steps: int | list[int] = 50
    eta: float = 0.0
    skip: Skip = "linear"
    variance: Variance | None = None
    features: str = "inception"
    precision_features: str | None = None
    max_real: int | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    seed: int = 0
    png: bool = False

    def arguments(self, pipeline: Path, real: Path, trainer: Namespace) -> list[str]:
        """Arguments of the run of `predict` that makes and measures the pictures.

        Args:
            pipeline: Folder of the weights.
            real: The real pictures.
            trainer: The trainer's settings of the training config.
        """
        is_gpu = trainer.accelerator in GPU or (trainer.accelerator == "auto" and torch.cuda.is_available())
        names = ("num_inference_steps", "sampler", "eta", "skip", "variance", "seed")
        model = {"pretrained": str(pipeline), **{name: getattr(self, name) for name in names}}
        model |= {"dtype": self.dtype or ("float16" if is_gpu else "float32"), "channels_last": is_gpu}
        strategy = {"stages": 1, "compile": "full" if is_gpu else "none"}
        precision = self.features if self.precision_features is None else self.precision_features
        given = {
            "model": _of("models.UnconditionalPredictor", model),
            "data": _of("data.Unconditional", {"number": self.number, "batch_size": self.batch_size}),
            "trainer.strategy": _of("strategies.AsyncDiffStrategy", strategy),
            "trainer.callbacks": [_of("callbacks.PictureArchive", {})],
            "trainer.inference_mode": False,
            "clip_score.model": None,
            "frame_writer.png": self.png,
            "frechet_distance.real": str(real),
            "frechet_distance.features": self.features,
            "frechet_distance.max_real": self.max_real,
            "precision_recall.real": str(real),
            "precision_recall.features": precision,
            "precision_recall.max_real": self.max_real or 10_000,
        }
        kept = ("accelerator", "devices", "num_nodes", "logger", "benchmark", "enable_progress_bar")
        given |= {f"trainer.{name}": _plain(trainer[name]) for name in kept if trainer[name] is not None}
        return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]


def _of(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"asyncdiff_pl.{kind}", "init_args": settings}


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value
