"""Measures how far asynchronous layouts take the latents from one rank's, with our cuts and the original AsyncDiff's.

    python scripts/measure_deviation.py measure deviation --shard 0/4   # several on each GPU, all in one folder
    python scripts/measure_deviation.py merge deviation

Runs tiny-svd (25 steps) and tiny-sd (50 steps) over held-out scenes in every layout, all ranks played in one process.
`merge` prints a table: the relative deviation |x - y| / |y| of the final latents x from one rank's y, its mean over the
samples with the standard error, and the difference to the original's for as many GPUs, paired by sample.

The original's cuts are lists of blocks for each checkpoint (github.com/czg1225/AsyncDiff). For the smaller UNets here
they are taken at the same places: SVD's less the layers that are not there, and for tiny-sd, which has three levels,
those of SD 2.1 by their place on the way through the network.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, StableVideoDiffusionPipeline
from scene_samples import FPS, compute_exactly, held_out, load
from shards import parse_shard, run_commands, whole_lines, write_table
from sheets import to_images
from torch import Tensor

from asyncdiff_pl.metrics.paired import mean_with_error, paired_difference
from asyncdiff_pl.models.noise import sample_seed
from asyncdiff_pl.models.quiet import quiet_libraries
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
ORIGINAL_NAME = "original AsyncDiff"


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
    others: dict[int, dict[str, dict[str, Any]]] = {
        2: {"cfg 2": {"cfg": 2}, "2 steps": {"steps": 2}},
        4: {"cfg 2 x 2 stages": {"stages": 2, "cfg": 2}, "cfg 2 x 2 steps": {"steps": 2, "cfg": 2}},
    }
    found = []
    for gpus, more in others.items():
        found.append(Job(gpus, ORIGINAL_NAME, {"stages": gpus, "cut": ORIGINAL[model, gpus]}))
        found.append(Job(gpus, f"{gpus} stages", {"stages": gpus}))
        found.append(Job(gpus, f"{gpus} stages, folded", {"stages": gpus, "folded": True}))
        found += [Job(gpus, name, settings) for name, settings in more.items()]
    return found


class Row(NamedTuple):
    """One sample in one layout.

    Args:
        model: Pipeline.
        steps: Denoising steps.
        seed: Seed of the noise.
        gpus: Ranks of the layout.
        schedule: Its name.
        sample: Number of the held-out scene.
        deviation: |x - y| / |y|.
    """

    model: str
    steps: int
    seed: int
    gpus: int
    schedule: str
    sample: int
    deviation: float


def measure(
    folder: Path,
    shard: str = "0/1",
    models: Sequence[Literal["tiny-svd", "tiny-sd"]] = ("tiny-svd", "tiny-sd"),
    samples: int = 64,
    svd_steps: int = 25,
    sd_steps: int = 50,
    batch_size: int = 16,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> None:
    """Runs the layouts, and appends each sample's deviation; started again, it goes on where it was.

    Args:
        folder: Where the rows go; all shards share it.
        shard: `0/4` runs layouts 0, 4, 8 and so on, `1/4` layouts 1, 5, 9.
        models: What is measured.
        samples: Held-out scenes.
        svd_steps: Denoising steps of videos.
        sd_steps: Denoising steps of pictures.
        batch_size: Samples of one call.
        device: Where everything runs.
        seed: Seed of the noise, which is the same in all layouts.
    """
    index, number = parse_shard(shard)
    compute_exactly()
    folder.mkdir(parents=True, exist_ok=True)
    steps = {"tiny-svd": svd_steps, "tiny-sd": sd_steps}
    path = folder / f"deviation_{index}of{number}.csv"
    if path.exists():
        path.write_text("".join(whole_lines(path)), encoding="utf-8")
    there = Counter(row[:5] for row in read_rows(folder))
    jobs = [(model, job) for model in models for job in jobs_of(model)][index::number]
    prepared = {}
    for model, job in jobs:
        key = (model, steps[model], seed, job.gpus, job.name)
        if there[key] >= samples:
            continue
        if model not in prepared:
            pipe, run = (videos if model == "tiny-svd" else pictures)(samples, steps[model], batch_size, device, seed)
            prepared[model] = pipe, run, run()
        pipe, run, reference = prepared[model]
        started = time.perf_counter()
        handle = parallelize(pipe, warm_up=WARM_UP, simulate=True, **job.settings)
        try:
            latents = run()
        finally:
            handle.remove()
        own = deviations(latents, reference).tolist()
        write_rows(path, [Row(*key, at, x) for at, x in enumerate(own)])
        seconds = time.perf_counter() - started
        print(f"{model}, {job.gpus} GPUs, {job.name}: {sum(own) / samples:.4f}, {seconds:.0f} s", flush=True)


def merge(folder: Path) -> None:
    """Prints a table for each model, and writes deviation.md and deviation.csv; needs neither models nor a GPU.

    Args:
        folder: Where the rows are.
    """
    rows = {row[:-1]: row for row in read_rows(folder)}
    if not rows:
        raise ValueError(f"{folder} holds no deviation_*of*.csv with rows; run `measure` into it first.")
    text = "\n".join(tables(rows.values()))
    (folder / "deviation.md").write_text(text + "\n", encoding="utf-8")
    (folder / "deviation.csv").unlink(missing_ok=True)
    write_rows(folder / "deviation.csv", sorted(rows.values()))
    print(text)


def tables(rows: Iterable[Row]) -> list[str]:
    """Lines of a table for each model, each layout beside the original's for as many GPUs."""
    found: dict[tuple[Any, ...], dict[tuple[int, str], list[Row]]] = {}
    for row in sorted(rows):
        found.setdefault((row.model, row.steps, row.seed), {}).setdefault((row.gpus, row.schedule), []).append(row)
    lines = []
    for (model, steps, _), layouts in found.items():
        # a layout whose last sample is not there yet is not shown
        samples = max(map(len, layouts.values()))
        own = {key: torch.tensor([row.deviation for row in of]) for key, of in layouts.items() if len(of) == samples}
        lines += ["", f"{model}, {steps} steps, {samples} samples, warm_up {WARM_UP}", ""]
        lines += ["| GPUs | schedule | relative deviation of the latents | less the original's |", "|---|---|---|---|"]
        for job in jobs_of(model):
            key, original = (job.gpus, job.name), (job.gpus, ORIGINAL_NAME)
            if key not in own:
                continue
            value, told = mean_with_error(own[key]), ""
            if key != original and original in own:
                less = paired_difference(own[key], own[original])
                told = f"{less.value:+.4f} ± {less.standard_error:.4f}"
            lines.append(f"| {job.gpus} | {job.name} | {value.value:.4f} ± {value.standard_error:.4f} | {told} |")
    return lines


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows to a CSV file, with a header if it is new."""
    write_table(path, Row._fields, ((*row[:-1], f"{row.deviation:.6f}") for row in rows), append=True)


def read_rows(folder: Path) -> list[Row]:
    """Rows of all shards; a line that was cut off is left out."""
    rows = []
    for path in sorted(folder.glob("deviation_*of*.csv")):
        for model, steps, seed, gpus, schedule, sample, deviation in list(csv.reader(whole_lines(path)))[1:]:
            rows.append(Row(model, int(steps), int(seed), int(gpus), schedule, int(sample), float(deviation)))
    return rows


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
    run_commands(measure, merge, description=__doc__)
