"""What a run would take, before it runs: samples, time, disk, and how the denoiser would be cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from asyncdiff_pl.callbacks import FrameWriter
from asyncdiff_pl.callbacks.sample_table import key_of, read_table
from asyncdiff_pl.models.schedulers import build_scheduler, find_scheduler
from asyncdiff_pl.models.sources import find_folder, read_json
from asyncdiff_pl.parallel.guidance import find_latents, split_batch
from asyncdiff_pl.parallel.patches.rows import ROWS, row_unit, shares
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.stopwatch import denoising_rate
from asyncdiff_pl.parallel.stages.units import trace
from asyncdiff_pl.parallel.steps.settings import round_of
from asyncdiff_pl.parallel.warm_up import count_exact, noise_levels, span_of
from asyncdiff_pl.strategies import (
    AsyncDiffStrategy,
    GroupStrategy,
    PatchStrategy,
    StepParallelStrategy,
    TimeParallelStrategy,
)

BYTES_PER_PIXEL = {"png": 1.45, "gif": 0.65, "webp": 0.2, "none": 0.0}
"""Size of written photographs, in the mean over COCO images of 1024x576 pixels."""


PLAIN = {
    "compile": "none",
    "balance": "operations",
    "warm_up_mode": "replicated",
    "layout": "fixed",
    "portion": 1.0,
}
"""Settings of a strategy that go without saying."""


FORESEEN = (AsyncDiffStrategy, PatchStrategy, StepParallelStrategy, TimeParallelStrategy)
"""Strategies of ours; of a user's own nobody knows what its ranks compute."""


class Cost(NamedTuple):
    """What the denoiser costs under a layout.

    Args:
        flops: Floating-point operations of one whole call (of one half of the guidance batch with cfg 2).
        shares: Share of them in each stage or patch, or for each of the steps at a time.
        cut: How the denoiser is cut, for people; empty where it is not.
    """

    flops: int
    shares: tuple[float, ...]
    cut: str = ""


def describe_run(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> str:
    """Says what a run would take.

    Args:
        trainer: Holds the strategy and the devices.
        module: What would run; its `check` has passed.
        data: What it would run on; its `check` has passed.
    """
    strategy = trainer.strategy
    steps: list[int] = list(module.num_inference_steps)
    folder = Path(trainer.logger.log_dir) if trainer.logger is not None and trainer.logger.log_dir else None
    done = _done(folder)
    left = {n: sum((n, name) not in done for name in data.ids()) for n in steps}
    samples = sum(left.values())
    groups = getattr(strategy, "data_size", trainer.world_size)
    ranks = trainer.world_size // groups
    size = getattr(data, "height", None), getattr(data, "width", None)
    is_chosen = getattr(strategy, "layout", None) == "auto"
    if is_chosen:
        strategy.settle(strategy.choose(module, size, measures=False))
    height, width = module.picture_size(*size)
    frames = module.frames_per_sample
    lines = {
        "model": f"{module.pretrained}, {module.weights_description} weights, {_name(module.torch_dtype)}",
        "samples": _samples(data.num_samples, steps, samples),
        "ranks": f"{trainer.world_size} on {strategy.root_device.type}: {_count(groups, 'data group')} of {ranks} "
        f"({_settings(strategy)})",
    }
    if samples < groups:
        lines["ranks"] += f"; {groups - samples} of the data groups have nothing to do"
    if is_chosen:
        lines["layout"] = strategy.choice.reason
        if strategy.balance == "measured":
            lines["layout"] += " This is by counted operations; the run itself measures."
    if height is not None and width is not None:
        example = module.example_call(height, width)
        if example is None:
            lines["time"] = f"not known before a run. {module.why_unforeseen}"
        elif isinstance(strategy, GroupStrategy) and not isinstance(strategy, FORESEEN):
            lines["time"] = f"not known before a run: what ranks do by {type(strategy).__name__} is not foreseen"
        elif hasattr(strategy, "max_iterations"):
            lines["time"] = "not known before a run: it is the samples that tell how many iterations they take"
        else:
            cost = _cost(strategy, *example)
            if cost.cut:
                lines["cut"] = cost.cut
            exact = {n: _exact_steps(strategy, module, n) for n in steps}
            if max(getattr(strategy, "stages", 1), getattr(strategy, "steps", 1)) > 1:
                lines["exact"] = _exact(strategy, exact)
            lines["time"] = _time(trainer, cost, left, exact, groups, module.torch_dtype)
        lines["disk"] = (
            f"about {_bytes(samples * frames * height * width * _bytes_per_pixel(trainer, frames))} for "
            f"{_count(samples * frames, 'frame')} of {width}x{height}"
        )
    if folder is not None:
        lines["folder"] = str(folder)
    advice = strategy.advice(module) if hasattr(strategy, "advice") else None
    if advice:
        lines["note"] = advice
    described = [f"{name:8} {text}" for name, text in lines.items()]
    return "\n".join([*described, "The input is right, as far as that can be seen; nothing was run."])


def _samples(number: int, steps: list[int], left: int) -> str:
    planned = number * len(steps)
    text = f"{number} of {steps[0]} steps"
    if len(steps) > 1:
        text = f"{number} x {len(steps)} step counts ({', '.join(map(str, steps))}) = {planned}"
    return text + (f", {planned - left} of them done before" if left < planned else "")


def _done(folder: Path | None) -> set[tuple[int, str]]:
    """Keys of the samples that a run which would go on has made."""
    if folder is None:
        return set()
    tables = [folder / "samples.csv", *folder.glob("samples.part*.csv")]
    return {key_of(row) for table in tables for row in read_table(table)}


def _cost(strategy: Any, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    """Traces the denoiser and cuts it as the run would.

    Args:
        strategy: Tells the layout, if it has one.
        twin: The denoiser on the meta device.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
    """
    if getattr(strategy, "cfg", 1) == 2:
        args, kwargs = split_batch(twin.forward, args, kwargs, 0)
    graph = trace(twin, args, kwargs, find_latents(twin.forward, args, kwargs))
    total = sum(unit.flops for unit in graph.units)
    patches = getattr(strategy, "patches", 1)
    if patches > 1:
        rows = find_latents(twin.forward, args, kwargs).shape[ROWS]
        each = shares(rows, patches, row_unit(twin))
        text = f"patches of {', '.join(map(str, each))} of the latents' {rows} rows"
        return Cost(total, tuple(own / rows for own in each), text)
    steps = getattr(strategy, "steps", 1)
    if steps > 1:
        # a call is whole, and serves as many steps
        return Cost(total, (1 / steps,) * steps)
    stages = getattr(strategy, "stages", 1)
    if stages == 1:
        return Cost(total, (1.0,))
    owner = find_cut(graph, stages, None, strategy.folded) if strategy.cut is None else resolve_cut(graph, strategy.cut)
    parts = [sum(u.flops for u, k in zip(graph.units, owner, strict=True) if k == s) / total for s in range(stages)]
    exchanged = _bytes(bytes_per_step(graph, find_boundary(graph, owner)))
    text = f"stages of {', '.join(f'{p:.0%}' for p in parts)} of the operations, {exchanged} of boundary tensors a step"
    return Cost(total, tuple(parts), text)


def _time(
    trainer: Trainer,
    cost: Cost,
    left: dict[int, int],
    exact: dict[int, tuple[int, int]],
    groups: int,
    dtype: torch.dtype,
) -> str:
    strategy = trainer.strategy
    share = max(cost.shares) / getattr(strategy, "stride", 1)
    if getattr(strategy, "simulate", False):
        # one process computes what the ranks would, one after another
        share = 1.0
    halves = getattr(strategy, "cfg", 1) if getattr(strategy, "simulate", False) else 1
    # the last samples keep only some of the groups busy
    calls = halves * math.ceil(sum(left.values()) / groups) / max(1, sum(left.values()))
    device = strategy.root_device
    rate = denoising_rate(device, dtype)
    if device.type == "cpu":
        # the ranks share the cores
        rate /= trainer.world_size / trainer.num_nodes
    times = []
    for bound in range(2):
        steps = sum(count * (exact[n][bound] + (n - exact[n][bound]) * share) for n, count in left.items())
        times.append(_duration(calls * steps * cost.flops / rate))
    return (
        f"about {' to '.join(dict.fromkeys(times))} in the denoiser ({operations(cost.flops)} a call, "
        f"{operations(rate)}/s a rank); encoders, decoding and scores come on top"
    )


def _exact(strategy: Any, exact: dict[int, tuple[int, int]]) -> str:
    texts = [f"{_range(*bounds)} of {n}" for n, bounds in exact.items()]
    text = f"{', '.join(texts)} steps of a sample"
    if not isinstance(strategy.warm_up, int):
        text += f" (warm-up {strategy.warm_up})"
    if getattr(strategy, "refresh_every", None) is not None:
        text += f", with a refresh each {strategy.refresh_every} steps"
    return text


def _range(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def _exact_steps(strategy: Any, module: LightningModule, num_steps: int) -> tuple[int, int]:
    """The fewest and the most steps of a sample that every rank computes whole."""
    if getattr(strategy, "patches", 1) > 1:
        return 0, 0
    at_a_time = getattr(strategy, "steps", 1)
    if at_a_time > 1:
        exact = sum(round_of(n, num_steps, at_a_time, strategy.warm_up) is None for n in range(num_steps))
        return exact, exact
    if getattr(strategy, "stages", 1) == 1:
        return num_steps, num_steps
    span = span_of(strategy.warm_up, noise_before(module, num_steps))
    most = num_steps if span.most is None else span.most
    refresh_every = strategy.refresh_every
    fewest, most = (count_exact(min(n, num_steps), refresh_every, num_steps) for n in (span.fewest, most))
    return fewest, most


def noise_before(module: LightningModule, num_steps: int) -> Callable[[], list[float]] | None:
    """Gives the noise before each step; None where the scheduler cannot be known before the run."""
    folder = find_folder(module.pretrained)
    if folder is None:
        return None
    config = read_json(folder / "scheduler", "scheduler_config.json", "the scheduler of a diffusers pipeline")
    if config.get("use_dynamic_shifting"):
        # FLUX and its like shift their noise by the size of the picture
        return None
    own = find_scheduler(config["_class_name"]).from_config(config)
    scheduler = build_scheduler(module.scheduler_name, own, module.scheduler_config)

    def levels() -> list[float]:
        scheduler.set_timesteps(num_steps)
        return noise_levels(scheduler)

    return levels


def _settings(strategy: Any) -> str:
    if not hasattr(strategy, "describe"):
        return type(strategy).__name__
    described = {name: value for name, value in strategy.describe().items() if value not in (None, False)}
    described = {name: value for name, value in described.items() if value != PLAIN.get(name)}
    name = described.pop("strategy")
    return ", ".join([name, *(f"{key} {value}" if value is not True else key for key, value in described.items())])


def _bytes_per_pixel(trainer: Trainer, frames: int) -> float:
    total = 0.0
    for writer in trainer.callbacks:
        if isinstance(writer, FrameWriter):
            total += BYTES_PER_PIXEL["png"] * writer.png + BYTES_PER_PIXEL[writer.animation] * (frames > 1)
    return total


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def operations(number: float) -> str:
    """A number of operations for people."""
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
