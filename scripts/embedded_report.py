"""What is measured of the embedded models, a figure with its bound, and the report of all figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Options:
    """What is measured, of which models, and where.

    Args:
        output: Folder for the report and the pictures.
        device: Where everything runs: cuda, cuda:1, cpu.
        dtype: Number format of the pipelines and autoencoders (weights are stored as float16); CLIP runs in float32.
        batch_size: Videos of one pipeline call; 31 of 128x128 pixels is the most that attention over time takes on a
            GPU.
        picture_batch_size: Pictures of one pipeline call.
        limit: At most this many samples for each figure, for a quick try; null takes as many as the bounds ask for.
        steps: Denoising steps.
        few_steps: Denoising steps that `steps` are compared with.
        dit_guidance: Guidance scale of the class pipeline.
        dit_samples: Pictures of each class.
        seed: Seed of the noise and of the choice of candidates.
        clip: CLIP model: an embedded one or a folder.
        svd: Video pipeline: an embedded one or a folder.
        sd: Picture pipeline: an embedded one or a folder.
        dit: Class pipeline: an embedded one or a folder.
        image_autoencoder: Component of the package or a folder.
        video_autoencoder: Component of the package or a folder.
    """

    output: Path = Path("evaluation")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_size: int = 16
    picture_batch_size: int = 50
    limit: int | None = None
    steps: int = 25
    few_steps: int = 3
    dit_guidance: float = 4.0
    dit_samples: int = 4
    seed: int = 0
    clip: str = "tiny-clip"
    svd: str = "tiny-svd"
    sd: str = "tiny-sd"
    dit: str = "tiny-dit"
    image_autoencoder: str = "scene-image-autoencoder"
    video_autoencoder: str = "scene-video-autoencoder"

    def count(self, asked: int) -> int:
        """How many samples a figure gets of those that it asks for."""
        return asked if self.limit is None else min(self.limit, asked)


@dataclass
class Line:
    """One figure of the report.

    Args:
        model: Which model.
        what: What was measured.
        value: The figure.
        low: It should be at least this; None if there is no such bound.
        high: It should be at most this; None if there is no such bound.
        note: How it came about: standard error, number of samples, the figures behind it.
    """

    model: str
    what: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def bound(self) -> str:
        """The bound in words; empty where the figure only informs."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f">= {self.low:g}" if self.low is not None else f"<= {self.high:g}" if self.high is not None else ""

    @property
    def result(self) -> str:
        """`pass` or `MISS`; empty where there is no bound. What is not a number misses."""
        if not self.bound:
            return ""
        above = self.low is None or self.value >= self.low
        return "pass" if above and (self.high is None or self.value <= self.high) else "MISS"


def markdown(lines: Sequence[Line]) -> str:
    """The figures as a Markdown table."""
    rows = [
        f"| {line.model} | {line.what} | {line.value:.4g}{f' ({line.note})' if line.note else ''} | {line.bound} | "
        f"{line.result} |"
        for line in lines
    ]
    return "\n".join(["| model | figure | measured | bound | |", "|---|---|---|---|---|", *rows, ""])


def report(options: Options, lines: Sequence[Line]) -> str:
    """The figures and how they were made, as JSON."""
    settings = dataclasses.asdict(options) | {"torch": torch.__version__}
    del settings["output"]
    if options.device.startswith("cuda"):
        settings["device"] = torch.cuda.get_device_name(options.device)
    figures = [dataclasses.asdict(line) | {"bound": line.bound, "result": line.result} for line in lines]
    return json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n"
