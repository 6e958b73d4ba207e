"""What a run would take, before it runs: samples, time, disk, and how the denoiser would be cut."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from asyncdiff_pl.parallel.guidance import find_latents, split_batch
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.units import trace

EFFICIENCY = 0.3
"""Share of a large matrix product's rate that denoisers reach in eager mode: SVD 0.32, SDXL 0.28 on an H200."""
PNG_BYTES_PER_PIXEL = 1.6
"""Size of a photograph's PNG, with its share of the animation."""


def describe_run(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> str:
    """Says what a run would take.

    Args:
        trainer: Holds the strategy and the devices.
        module: What would run; its `check` has passed.
        data: What it would run on; its `check` has passed.
    """
    steps: list[int] = list(module.num_inference_steps)
    samples = data.num_samples
    frames = samples * len(steps) * module.frames_per_sample
    height, width = getattr(data, "height", None), getattr(data, "width", None)
    strategy = trainer.strategy
    groups = getattr(strategy, "data_size", trainer.world_size)
    lines = [
        f"samples: {samples} x step counts {steps} = {samples * len(steps)}, on {groups} data group(s) of "
        f"{trainer.world_size // groups} rank(s)"
    ]
    if height is not None and width is not None:
        size = frames * height * width * PNG_BYTES_PER_PIXEL
        lines.append(f"disk: about {size / 2**30:.2f} GiB for {frames} frames of {width}x{height} as PNG and GIF")
        example = module.example_call(height, width)
        if example is not None:
            lines += _time(strategy, example, samples, steps, groups, str(module.torch_dtype))
        else:
            lines.append(f"time: not known before a run; {type(module).__name__} gives no `example_call`")
    return "\n".join(lines)


def _time(
    strategy: Any, example: tuple[nn.Module, Any, Any], samples: int, steps: list[int], groups: int, dtype: str
) -> list[str]:
    twin, args, kwargs = example
    if getattr(strategy, "cfg", 1) == 2:
        args, kwargs = split_batch(twin.forward, args, kwargs, 0)
    graph = trace(twin, args, kwargs, find_latents(twin.forward, args, kwargs))
    total = sum(unit.flops for unit in graph.units)
    stages, stride = getattr(strategy, "stages", 1), getattr(strategy, "stride", 1)
    lines = []
    slowest = 1.0
    if stages > 1:
        owner = find_cut(graph, stages) if strategy.cut is None else resolve_cut(graph, strategy.cut)
        shares = [
            sum(u.flops for u, k in zip(graph.units, owner, strict=True) if k == s) / total for s in range(stages)
        ]
        slowest = max(shares)
        travelling = bytes_per_step(graph, find_boundary(graph, owner))
        lines.append(
            f"cut: stages of {', '.join(f'{share:.0%}' for share in shares)} of the operations, "
            f"{travelling / 2**20:.1f} MiB of boundary tensors a step"
        )
    warm_up = getattr(strategy, "warm_up", 0)
    simulated = stages * getattr(strategy, "cfg", 1) if getattr(strategy, "simulate", False) else 1
    calls = sum(min(n, warm_up) + max(0, n - warm_up) * (slowest / stride * simulated) for n in steps)
    rate = _matrix_rate(strategy.root_device, dtype)
    seconds = calls * samples / groups * total / (EFFICIENCY * rate)
    lines.append(
        f"time: about {_duration(seconds)} in the denoiser ({total / 1e12:.2f} TFLOP a call, {rate / 1e12:.2f} TFLOP/s "
        f"measured in a matrix product on {strategy.root_device}, of which {EFFICIENCY:.0%} are reckoned with); "
        "encoders, decoding and scores come on top"
    )
    return lines


def _matrix_rate(device: torch.device, dtype: str) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    kind = getattr(torch, dtype.removeprefix("torch.")) if device.type == "cuda" else torch.float32
    left = torch.randn(size, size, device=device, dtype=kind)
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
