"""What a step of a denoising loop is made of: kernels by torch's profiler, for scripts/benchmark_denoising.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shards import write_table
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "messages": r"nccl|c10d::|gloo",
    # named after all operators that they stand for; those of products alone (`triton_tem_fused_mm`) are no fusions
    "compiled": r"^triton_(?!tem_)",
    "attention": r"flash|fmha|sdpa|attention",
    "convolutions": r"conv|fprop|implicit_gemm|winograd",
    "products": r"^triton_tem_|gemm|gemv|cublas|cutlass|nvjet|splitk|::(add|b)?mm\b|::linear",
    "copies": r"memcpy|memset|copy",
}
"""Kinds of kernels, by what their names have; the first that fits."""
COLUMNS = ("kind", "kernel", "calls_per_step", "us_per_step")


class Kernel(NamedTuple):
    """One run of a kernel, in microseconds."""

    name: str
    begin: float
    end: float


def kind_of_kernel(name: str) -> str:
    """Which of `KINDS` a kernel is, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def table_of(kernels: Iterable[Kernel], steps: int) -> list[tuple[str, str, float, float]]:
    """Rows of `COLUMNS`, those that take longest first."""
    found: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        calls, spent = found.get(kernel.name, (0, 0.0))
        found[kernel.name] = calls + 1, spent + kernel.end - kernel.begin
    rows = [(kind_of_kernel(name), name, calls / steps, spent / steps) for name, (calls, spent) in found.items()]
    return sorted(rows, key=lambda row: -row[3])


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel runs."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return busy


def summary(kernels: list[Kernel], steps: int) -> str:
    """One line: time of a step, how much of it something runs, and each kind's part and number of kernels."""
    if not kernels:
        return "the profiler saw no kernels"
    span = max(kernel.end for kernel in kernels) - min(kernel.begin for kernel in kernels)
    kinds: dict[str, tuple[float, float]] = {}
    for kind, _, calls, spent in table_of(kernels, steps):
        number, total = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = number + calls, total + spent
    parts = sorted(kinds.items(), key=lambda item: -item[1][1])
    told = ", ".join(f"{kind} {spent / 1e3:.2f} ms ({calls:.0f})" for kind, (calls, spent) in parts)
    return f"a step {span / steps / 1e3:.2f} ms, busy {busy_time(kernels) / steps / 1e3:.2f} ms: {told}"


def profiled(run: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """Runs something under the profiler.

    Args:
        run: What runs; it ends when the device has.
        device: Where; on a CPU operators stand for kernels.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() or () if event.device_type == wanted]
    if not on_gpu:
        # operators call others
        events = [event for event in events if _is_operator(event) and not _is_operator(event.cpu_parent)]
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def write_profile(folder: Path, name: str, kernels: list[Kernel], steps: int) -> Path:
    """Writes a table of a row's kernels.

    Args:
        folder: Where.
        name: The row's; what a file cannot be named is replaced.
        kernels: What ran.
        steps: In so many steps.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-zA-Z0-9._]+', '_', name)}.csv"
    rows = [(kind, kernel, f"{calls:g}", f"{spent:.2f}") for kind, kernel, calls, spent in table_of(kernels, steps)]
    write_table(path, COLUMNS, rows)
    return path
