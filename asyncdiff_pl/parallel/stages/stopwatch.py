"""How long a piece of a denoiser takes by itself on the device in use.

On an NVIDIA GPU it is recorded as a CUDA graph and replayed: eager times of small pieces are those of the CPU that
launches their kernels. Elsewhere it is run as it is.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch

ROUNDS = 10
"""Replays on a GPU; their median counts."""

LONG_ENOUGH_MS = 5.0
"""How long a replay should take at least, so that its launch does not count: short units run in it several times."""

MOST_TIMES = 20
"""How often at most."""

EFFICIENCY = 0.3
"""Share of a large matrix product's rate that denoisers reach in eager mode: SVD 0.32, SDXL 0.28 on an H200."""


class Stopwatch(Protocol):
    """Times what can be run again and again."""

    def __call__(self, name: str, run: Callable[[], Any]) -> int:
        """Nanoseconds of one run of a module."""


class Clock:
    """Times runs as they are: the median of three."""

    def __call__(self, name: str, run: Callable[[], Any]) -> int:
        """Nanoseconds of one run."""
        durations = []
        for _ in range(3):
            start = time.perf_counter_ns()
            run()
            durations.append(time.perf_counter_ns() - start)
        return int(statistics.median(durations))


class GraphClock:
    """Times runs on an NVIDIA GPU as CUDA graphs, by its own clock.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._has_warned = False

    def __call__(self, name: str, run: Callable[[], Any]) -> int:
        """Nanoseconds of one run; one that cannot be recorded is timed as it is, with a warning."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        # what the same run took on the current stream: this one would take it once more
        torch.cuda.empty_cache()
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            # before a recording, libraries must have set themselves up for the stream
            run()
            times = repeats(self._time(run, 1))
            graph = torch.cuda.CUDAGraph()
            try:
                self._record(graph, run, times)
                ms = self._time(graph.replay, ROUNDS)
            except RuntimeError as error:
                self._warn(name, error)
                times, ms = 1, self._time(run, ROUNDS)
            # a unit's memory goes back before the next one takes as much
            del graph
            torch.cuda.empty_cache()
        return int(1e6 * ms / times)

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Any], times: int) -> None:
        self._stream.synchronize()
        # what the run before took
        torch.cuda.empty_cache()
        # unlike `torch.cuda.graph`, without a collection of garbage each time; threads of NCCL may go on
        with torch.inference_mode(False):
            # what it notes of the random state must be writable to later recordings in any mode
            graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(times):
                run()
        finally:
            graph.capture_end()

    def _time(self, run: Callable[[], Any], rounds: int) -> float:
        """Median of the milliseconds of some runs."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        for mark in marks[:-1]:
            mark.record()
            run()
        marks[-1].record()
        marks[-1].synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks))

    def _warn(self, name: str, error: RuntimeError) -> None:
        if not self._has_warned:
            warnings.warn(
                f"{name} cannot be recorded as a CUDA graph ({error}): its time, and that of others like it, is that "
                "of an eager run.",
                stacklevel=2,
            )
        self._has_warned = True


def repeats(ms: float) -> int:
    """How often a run is recorded in a row.

    Args:
        ms: Milliseconds of one run with its launches.
    """
    return max(1, min(MOST_TIMES, round(LONG_ENOUGH_MS / max(ms, 1e-3))))


def stopwatch_for(device: torch.device) -> Stopwatch:
    """What times units on a device."""
    return GraphClock(device) if device.type == "cuda" else Clock()


def denoising_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that denoisers reach in eager mode, after the rate of a large matrix product.

    Args:
        device: Where it is measured.
        dtype: Number format of weights and activations.
    """
    size = 8192 if device.type == "cuda" else 1024
    # CPUs have no fast half precision to foresee by
    kind = dtype if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, dtype=kind, generator=generator)
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return EFFICIENCY * 2 * size**3 / min(times)
