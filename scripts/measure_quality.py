"""Measures what asynchrony costs in quality: tiny-svd and tiny-sd in patches, steps at a time and stages, simulated.

    python scripts/measure_quality.py measure quality --shard 0/4   # several on each GPU, all in one folder
    python scripts/measure_quality.py merge quality                  # needs no GPU

`measure` appends a row for each sample to quality/samples_0of4.csv, one setting after the other; started again, it goes
on where it was. One process leaves most of a large GPU idle; 6 of them keep it busy. `merge` writes samples.csv (all
rows), summary.csv, quality.md, quality.png and quality_ranks.png into the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableVideoDiffusionPipeline
from quality_rows import (
    LAYOUTS,
    ONE_RANK,
    PATCH_WARM_UPS,
    STEP_LAYOUTS,
    SVD_WARM_UPS,
    WARM_UPS,
    Conditions,
    Row,
    Setting,
    complete,
    patch_settings,
    read_rows,
    settings_of,
    write_rows,
)
from scene_samples import PerSceneMotion, Scorer, compute_exactly, generate_pictures, generate_videos, held_out, load
from shards import parse_shard, run_commands
from torch import Tensor

from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.parallel import parallelize

GUIDANCE = 5.0
"""Guidance scale of pictures; videos have their pipeline's own, 1 to 3."""


Method = Literal["patches", "steps", "stages"]


def measure(
    folder: Path,
    shard: str = "0/1",
    svd: str | None = "tiny-svd",
    sd: str | None = "tiny-sd",
    clip: str = "tiny-clip",
    methods: Sequence[Method] = ("patches", "steps", "stages"),
    warm_ups: Sequence[int] = WARM_UPS,
    svd_warm_ups: Sequence[int] = SVD_WARM_UPS,
    patch_warm_ups: Sequence[int] = PATCH_WARM_UPS,
    samples: int = 64,
    steps: int = 25,
    batch_size: int = 16,
    picture_batch_size: int = 64,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    only: Sequence[str] | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Runs held-out scenes in every setting, and compares each sample with what one rank makes of the same noise.

    Args:
        folder: Where the rows go; all shards share it.
        shard: `0/4` runs settings 0, 4, 8 and so on, `1/4` settings 1, 5, 9.
        svd: Video pipeline: an embedded one or a folder; null leaves it out.
        sd: Picture pipeline: an embedded one or a folder; null leaves it out.
        clip: Model that scores: an embedded one or a folder.
        methods: What is measured, in this order.
        warm_ups: Exact steps at the beginning; each layout in stages or steps is measured with each of them.
        svd_warm_ups: Those of the video pipeline.
        patch_warm_ups: Those of patches, for each mode that has steps after them.
        samples: Held-out scenes.
        steps: Denoising steps.
        batch_size: Videos of one call; 31 of 128x128 pixels is the most that attention over time takes on a GPU.
            Batches of one size share the recordings of a setting.
        picture_batch_size: Pictures of one call.
        dtype: Number format of the pipelines; CLIP runs in float32.
        only: Settings by their whole names, such as "4 stages, warm-up 3"; null for all.
        device: Where everything runs.
        seed: Seed of the noise, which is the same in all settings.
    """
    index, number = parse_shard(shard)
    compute_exactly()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{index}of{number}.csv"
    conditions = Conditions(steps, seed, dtype)
    names = {kind: name for kind, name in (("svd", svd), ("sd", sd)) if name is not None}
    jobs = [
        (kind, setting)
        for method in methods
        for kind in names
        for setting in wanted(method, svd_warm_ups if kind == "svd" else warm_ups, patch_warm_ups)
        if only is None or str(setting) in only
    ]
    unknown = set(only or ()) - {str(setting) for _, setting in jobs}
    if unknown:
        raise ValueError(f"only names {', '.join(sorted(unknown))}, which is not measured with these settings.")
    done = complete([row for part in read_rows(folder, conditions) for row in part], samples)
    # one rank stands at the beginning of each method
    todo = [job for job in list(dict.fromkeys(jobs))[index::number] if (names[job[0]], job[1]) not in done]
    own = [row for part in read_rows(folder, conditions, path.name) for row in part]
    # what was cut off in the middle is not kept
    write_rows(path, [row for row in own if (row.model, row.setting) in done])
    if not todo:
        return
    scorer = Scorer(clip, device)
    models = {}
    for kind, setting in todo:
        name = names[kind]
        if kind not in models:
            if kind == "svd":
                pipe = load(StableVideoDiffusionPipeline, name, dtype, device)
                generate, captions = prepare_videos(pipe, samples, steps, batch_size, device, seed)
            else:
                pipe = load(StableDiffusionPipeline, name, dtype, device)
                generate, captions = prepare_pictures(pipe, samples, steps, picture_batch_size, device, seed)
            models[kind] = pipe, generate, captions, generate()
        pipe, generate, captions, reference = models[kind]
        if setting.patches > most_patches(pipe):
            print(f"{name}, {setting}: left out, its latents have too few rows", flush=True)
            continue
        started = time.perf_counter()
        clips = reference if setting == ONE_RANK else run(pipe, setting, generate)
        ratios = psnr(clips, reference).tolist()
        scores = scorer.frames(clips, captions).mean(1).tolist()
        rows = [Row(name, conditions, setting, i, *pair) for i, pair in enumerate(zip(ratios, scores, strict=True))]
        write_rows(path, rows, append=True)
        means = sum(ratios) / samples, sum(scores) / samples
        seconds = time.perf_counter() - started
        print(f"{name}, {setting}: PSNR {means[0]:.2f} dB, score {means[1]:.2f}, {seconds:.0f} s", flush=True)


def wanted(method: Method, warm_ups: Iterable[int], patch_warm_ups: Iterable[int]) -> list[Setting]:
    """Settings of a method, one rank first."""
    if method == "patches":
        return [ONE_RANK, *patch_settings(patch_warm_ups)]
    return settings_of(warm_ups, LAYOUTS if method == "stages" else STEP_LAYOUTS)


def merge(folder: Path) -> None:
    """Puts the shards' rows together: tables, comparisons and a plot; needs neither models nor a GPU.

    Args:
        folder: Where the rows are, and where the report goes.
    """
    from quality_report import write_report  # needs matplotlib, which measuring does not

    print(write_report(folder))


Samples = tuple[Callable[[], Tensor], list[tuple[str, ...]]]
"""What makes all samples, [B, F, 3, H, W], from the same noise each time that it is called; and their captions."""


def prepare_videos(
    pipe: PerSceneMotion, samples: int, steps: int, batch_size: int, device: torch.device | str, seed: int
) -> Samples:
    """Videos from held-out scenes' pictures, each told to move as its scene does."""
    data = held_out(samples, pipe.unet.config.num_frames, device)
    numbers = data.motion_bucket_ids
    return lambda: generate_videos(pipe, data.pictures, numbers, steps, batch_size, seed), data.captions


def prepare_pictures(
    pipe: DiffusionPipeline, samples: int, steps: int, batch_size: int, device: torch.device | str, seed: int
) -> Samples:
    """Pictures from one caption of each held-out scene."""
    words = held_out(samples, device=device).captions
    prompts = [own[index % len(own)] for index, own in enumerate(words)]
    return lambda: generate_pictures(pipe, "prompt", prompts, GUIDANCE, steps, batch_size, seed)[:, None], words


def most_patches(pipe: DiffusionPipeline) -> int:
    """How many patches there is room for in the rows of the size that a pipeline was made for."""
    return pipe.unet.config.sample_size // 2 ** (len(pipe.unet.down_blocks) - 1)


def run(pipe: DiffusionPipeline, setting: Setting, generate: Callable[[], Tensor]) -> Tensor:
    """Makes all samples as the ranks of a layout would, all played in this process."""
    handle = parallelize(
        pipe,
        stages=setting.stages,
        stride=setting.stride,
        cfg=setting.cfg,
        warm_up=max(1, setting.warm_up),
        patches=setting.patches,
        mode=setting.mode or "full_sync",
        portion=setting.portion,
        steps=setting.at_once,
        simulate=True,
    )
    try:
        return generate()
    finally:
        handle.remove()


if __name__ == "__main__":
    run_commands(measure, merge, description=__doc__)
