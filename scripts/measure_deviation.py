"""Measures how far asynchronous stages take the latents from one rank's, with our cuts and the original AsyncDiff's.

    python scripts/measure_deviation.py --samples 64 --csv_file deviation.csv

Runs tiny-svd (25 steps) and tiny-sd (50 steps) over held-out scenes in every layout, all ranks played in one process,
and prints a table: the relative deviation |x - y| / |y| of the final latents x from one rank's y, its mean over the
samples with the standard error, and the difference to the original's for as many GPUs, paired by sample.

The original's cuts are lists of blocks for each checkpoint (github.com/czg1225/AsyncDiff). For the smaller UNets here
they are taken at the same places: SVD's less the layers that are not there, and for tiny-sd, which has three levels,
those of SD 2.1 by their place on the way through the network.
"""

from __future__ import annotations

import csv
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, StableVideoDiffusionPipeline
from jsonargparse import auto_cli
from scene_samples import FPS, held_out, load
from sheets import to_images
from torch import Tensor

from asyncdiff_pl.metrics.paired import mean_with_error, paired_difference
from asyncdiff_pl.models.base import sample_seed
from asyncdiff_pl.models.loading import quiet_libraries
from asyncdiff_pl.parallel import parallelize

GUIDANCE = 5.0
WARM_UP = 3

_DOWN, _UP, _OUT = "down_blocks", "up_blocks", ["conv_norm_out", "conv_out"]
_SVD_MIDDLE = [f"{_DOWN}.2", f"{_DOWN}.3", "mid_block", f"{_UP}.0", f"{_UP}.1"]
_LAST = f"{_UP}.3"
ORIGINAL = {
    ("tiny-svd", 2): [
        ["conv_in", f"{_DOWN}.0", f"{_DOWN}.1", *_SVD_MIDDLE],
        [f"{_UP}.2", _LAST, *_OUT],
    ],
    ("tiny-svd", 4): [
        ["conv_in", f"{_DOWN}.0", f"{_DOWN}.1.resnets", f"{_DOWN}.1.attentions"],
        [f"{_DOWN}.1.downsamplers", *_SVD_MIDDLE],
        [f"{_UP}.2", f"{_LAST}.resnets.0", f"{_LAST}.attentions.0"],
        [f"{_LAST}.resnets.1", f"{_LAST}.attentions.1", *_OUT],
    ],
    ("tiny-sd", 2): [
        ["conv_in", _DOWN, "mid_block", f"{_UP}.0"],
        [f"{_UP}.1", f"{_UP}.2", *_OUT],
    ],
    ("tiny-sd", 4): [
        ["conv_in", f"{_DOWN}.0", f"{_DOWN}.1"],
        [f"{_DOWN}.2", "mid_block", f"{_UP}.0"],
        [f"{_UP}.1", f"{_UP}.2.resnets.0"],
        [f"{_UP}.2.attentions", f"{_UP}.2.resnets.1", *_OUT],
    ],
}
"""The original's cuts for 2 and 4 GPUs."""


class Job(NamedTuple):
    """One layout.

    Args:
        gpus: Ranks that it takes.
        name: What it is called.
        settings: Arguments of `parallelize`.
    """

    gpus: int
    name: str
    settings: dict[str, Any]


def jobs_of(model: str) -> list[Job]:
    """The original's layout and ours, for 2 and 4 GPUs; the original's first."""
    found = []
    for gpus in (2, 4):
        found.append(Job(gpus, "original AsyncDiff", {"stages": gpus, "cut": ORIGINAL[model, gpus]}))
        found.append(Job(gpus, f"{gpus} stages", {"stages": gpus}))
        found.append(Job(gpus, f"{gpus} stages, folded", {"stages": gpus, "folded": True}))
    found.insert(3, Job(2, "cfg 2", {"cfg": 2}))
    found.append(Job(4, "cfg 2 x 2 stages", {"stages": 2, "cfg": 2}))
    return found


def main(
    models: Sequence[Literal["tiny-svd", "tiny-sd"]] = ("tiny-svd", "tiny-sd"),
    samples: int = 64,
    svd_steps: int = 25,
    sd_steps: int = 50,
    batch_size: int = 16,
    csv_file: Path | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Runs all layouts, and prints a table.

    Args:
        models: What is measured.
        samples: Held-out scenes.
        svd_steps: Denoising steps of videos.
        sd_steps: Denoising steps of pictures.
        batch_size: Samples of one call.
        csv_file: Where each sample's deviation goes, a row for each layout and sample.
        device: Where everything runs.
        seed: Seed of the noise, which is the same in all layouts.
    """
    torch.backends.cudnn.deterministic = True
    rows: list[tuple[Any, ...]] = []
    for model in models:
        steps = svd_steps if model == "tiny-svd" else sd_steps
        pipe, run = (videos if model == "tiny-svd" else pictures)(samples, steps, batch_size, device, seed)
        reference = run()
        originals: dict[int, Tensor] = {}
        print(f"\n{model}, {steps} steps, {samples} samples, warm_up {WARM_UP}\n")
        print("| GPUs | schedule | relative deviation of the latents | less the original's |\n|---|---|---|---|")
        for job in jobs_of(model):
            started = time.perf_counter()
            handle = parallelize(pipe, warm_up=WARM_UP, simulate=True, **job.settings)
            try:
                latents = run()
            finally:
                handle.remove()
            own = deviations(latents, reference)
            told = ""
            if job.gpus in originals:
                less = paired_difference(own, originals[job.gpus])
                told = f"{less.value:+.4f} ± {less.standard_error:.4f}"
            originals.setdefault(job.gpus, own)
            value = mean_with_error(own)
            print(f"| {job.gpus} | {job.name} | {value.value:.4f} ± {value.standard_error:.4f} | {told} |", flush=True)
            print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
            rows += [(model, steps, seed, job.gpus, job.name, at, f"{x:.6f}") for at, x in enumerate(own.tolist())]
    if csv_file is not None:
        with csv_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "steps", "seed", "gpus", "schedule", "sample", "deviation"))
            writer.writerows(rows)


def deviations(latents: Tensor, reference: Tensor) -> Tensor:
    """For each sample |x - y| / |y|, in float64: [samples]."""
    difference = (latents.double() - reference.double()).flatten(1).norm(dim=1)
    return difference / reference.double().flatten(1).norm(dim=1)


Run = Callable[[], Tensor]


def videos(samples: int, steps: int, batch_size: int, device: str, seed: int) -> tuple[Any, Run]:
    """tiny-svd, and what makes its final latents of all scenes."""
    pipe: Any = load(StableVideoDiffusionPipeline, "tiny-svd", "float32", device)
    num_frames = pipe.unet.config.num_frames
    data = held_out(samples, num_frames, device)
    height, width = data.pictures.shape[-2:]

    def call(part: slice, generators: list[torch.Generator]) -> Tensor:
        return pipe(
            to_images(data.pictures[part]),
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=steps,
            fps=FPS,
            motion_bucket_id=data.motion_bucket_ids[part],
            generator=generators,
            output_type="latent",
        ).frames

    return pipe, lambda: _all(call, samples, batch_size, seed)


def pictures(samples: int, steps: int, batch_size: int, device: str, seed: int) -> tuple[Any, Run]:
    """tiny-sd, and what makes its final latents of all captions."""
    pipe: Any = load(StableDiffusionPipeline, "tiny-sd", "float32", device)
    captions = [captions[0] for captions in held_out(samples, device=device).captions]

    def call(part: slice, generators: list[torch.Generator]) -> Tensor:
        return pipe(
            captions[part],
            guidance_scale=GUIDANCE,
            num_inference_steps=steps,
            generator=generators,
            output_type="latent",
        ).images

    return pipe, lambda: _all(call, samples, batch_size, seed)


def _all(call: Callable[[slice, list[torch.Generator]], Tensor], samples: int, batch_size: int, seed: int) -> Tensor:
    found = []
    for start in range(0, samples, batch_size):
        part = slice(start, min(start + batch_size, samples))
        generators = [
            torch.Generator().manual_seed(sample_seed(seed, str(index))) for index in range(part.start, part.stop)
        ]
        with quiet_libraries():
            found.append(call(part, generators).cpu())
    return torch.cat(found)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
