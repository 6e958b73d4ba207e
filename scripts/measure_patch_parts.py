"""Which part of `separate_gn` takes patches away from one rank: rows that are old, rows over the edge, or keys.

    python scripts/measure_patch_parts.py --model tiny-svd --samples 6

Each patch has its own GroupNorm statistics there, and all else comes from the other patches, a step old. Here one
part of it at a time is as fresh as can be, or is left out. Prints a Markdown table of PSNR against one rank, simulated
in one process; rows with a mode's name are what users have, the others are of this script alone.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline, StableVideoDiffusionPipeline
from jsonargparse import auto_cli
from measure_quality import prepare_pictures, prepare_videos
from quality_figures import Mean, pm
from scene_samples import load
from torch import Tensor

from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.patches import convolution, settings
from asyncdiff_pl.parallel.patches.settings import PatchMode, Source


@contextlib.contextmanager
def rows_from(source: Source) -> Iterator[None]:
    """Has `separate_gn` take all that it needs of other patches from somewhere else."""
    with mock.patch.dict(settings._SOURCES, {"separate_gn": source}):
        yield


@contextlib.contextmanager
def no_rows_over_edges() -> Iterator[None]:
    """Has convolutions see zeros beyond their patch after warm-up, as at the edge of a picture."""
    own = convolution._halos

    def halos(first: Tensor, last: Tensor, halo: Any, name: str, step: Any) -> tuple[Tensor, Tensor]:
        return own(first, last, halo, name, replace(step, source=Source.NONE) if step.source is Source.STALE else step)

    with mock.patch.object(convolution, "_halos", halos):
        yield


ROWS: dict[str, tuple[PatchMode, float, Callable[[], contextlib.AbstractContextManager[None]]]] = {
    "`naive`": ("naive", 1.0, contextlib.nullcontext),
    "`separate_gn`": ("separate_gn", 1.0, contextlib.nullcontext),
    "its rows and keys of this step": ("separate_gn", 1.0, lambda: rows_from(Source.FRESH)),
    "its keys alone left out (`portion` 0)": ("separate_gn", 0.0, contextlib.nullcontext),
    "its rows over the edge alone left out": ("separate_gn", 1.0, no_rows_over_edges),
    "both left out: `naive` after an exact warm-up": ("separate_gn", 1.0, lambda: rows_from(Source.NONE)),
    "`stale_gn`": ("stale_gn", 1.0, contextlib.nullcontext),
}
"""Mode, portion and change of each row."""


def measure(
    model: str = "tiny-svd",
    samples: int = 6,
    patches: int = 2,
    warm_up: int = 5,
    steps: int = 25,
    batch_size: int = 8,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Prints the table.

    Args:
        model: Embedded pipeline: tiny-svd or tiny-sd.
        samples: Held-out scenes.
        patches: Patches of rows.
        warm_up: Synchronous steps.
        steps: Denoising steps.
        batch_size: Samples of one call.
        device: Where it runs.
    """
    torch.backends.cudnn.deterministic = True
    if model == "tiny-svd":
        pipe = load(StableVideoDiffusionPipeline, model, "float32", device)
        generate, _ = prepare_videos(pipe, samples, steps, batch_size, device, 0)
    else:
        pipe = load(StableDiffusionPipeline, model, "float32", device)
        generate, _ = prepare_pictures(pipe, samples, steps, batch_size, device, 0)
    reference = generate()
    print(
        f"{model}, {samples} scenes, {patches} patches, warm_up {warm_up}, {steps} steps\n\n| | PSNR, dB |\n|---|---|"
    )
    for name, (mode, portion, change) in ROWS.items():
        with change():
            handle = parallelize(
                pipe, patches=patches, mode=mode, portion=portion, warm_up=warm_up, capture=False, simulate=True
            )
            try:
                found = psnr(generate(), reference).tolist()
            finally:
                handle.remove()
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        print(f"| {name} | {pm(Mean(statistics.fmean(found), error))} |", flush=True)


if __name__ == "__main__":
    try:
        auto_cli(measure, description=__doc__)
    except ValueError as error:
        sys.exit(f"error: {error}")
