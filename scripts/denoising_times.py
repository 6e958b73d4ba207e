"""Times of the steps of a denoising loop, and what they come to, for scripts/benchmark_denoising.py."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff_pl.parallel.steps.settings import round_of


@dataclass(frozen=True)
class Run:
    """Times of one loop.

    Args:
        seconds: Wall time.
        steps_ms: Time of each step on the device, from the end of the one before.
        denoiser_ms: Time of each step's denoiser call among it.
        host_ms: Time that the CPU spent on each step.
    """

    seconds: float
    steps_ms: list[float]
    denoiser_ms: list[float]
    host_ms: list[float]


class Marks:
    """Marks in a loop: events on a GPU, where nothing waits, and the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock: list[float] = []
        self._events: list[Any] = []

    def add(self) -> None:
        """Marks this moment."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        self._clock.append(time.perf_counter())

    def read(self, seconds: float) -> Run:
        """The times between the marks: one before the loop, and in each step three."""
        host = [1000 * (end - start) for start, end in itertools.pairwise(self._clock)]
        device = [start.elapsed_time(end) for start, end in itertools.pairwise(self._events)] if self._on_gpu else host
        steps = _in_threes(device)
        return Run(seconds, [sum(step) for step in steps], [step[1] for step in steps], [*map(sum, _in_threes(host))])


def _in_threes(values: list[float]) -> list[tuple[float, ...]]:
    return [tuple(values[at : at + 3]) for at in range(0, len(values), 3)]


def figures(runs: list[Run], exact: int, stride: int = 1) -> dict[str, Any]:
    """Medians over the runs and over the steps of a kind; the first step, which prepares the sample, is left out.

    The last step sends nothing. So on the rank of the slowest stage it takes what that stage computes, `last_ms`. With
    stride 2 one step in two does nothing but broadcast: what counts is the mean.
    """

    def middle(name: str, kind: slice) -> float:
        return (statistics.median if stride == 1 else statistics.fmean)(_per_step(runs, name)[kind])

    last = len(runs[0].steps_ms) - 1
    kind = slice(min(1, exact - 1), exact)
    row: dict[str, Any] = {"exact_steps": exact, "exact_step_ms": middle("steps_ms", kind), "timed_loops": len(runs)}
    if exact < last:
        kind = slice(exact, last)
        row["asynchronous_step_ms"] = middle("steps_ms", kind)
        if stride == 1:
            row["last_ms"] = middle("steps_ms", slice(last, None))
    row["glue_ms"] = middle("steps_ms", kind) - middle("denoiser_ms", kind)
    return row | {"host_ms": middle("host_ms", kind)}


def figures_of_rounds(runs: list[Run], warm_up: int, at_a_time: int) -> dict[str, Any]:
    """The same where steps are computed several at a time: a step has its share of its round.

    The first step of a round takes the time of all, and the others next to none. Rounds of all ranks count; where there
    is none, since fewer steps are left after warm-up, the one that there is. A last step that is left alone is exact.

    Args:
        runs: The loops.
        warm_up: Exact steps at the start.
        at_a_time: Steps of a round.
    """
    number = len(runs[0].steps_ms)
    found = {round_of(step, number, at_a_time, warm_up) for step in range(number)}
    rounds = [each for each in found if each is not None]
    if not rounds:
        return figures(runs, number)
    size = max(each.size for each in rounds)
    starts = [each.first for each in rounds if each.size == size]

    def middle(name: str) -> float:
        values = _per_step(runs, name)
        return statistics.median(sum(values[start : start + size]) / size for start in starts)

    return {
        "exact_steps": number - sum(each.size for each in rounds),
        "exact_step_ms": statistics.median(_per_step(runs, "steps_ms")[min(1, warm_up - 1) : warm_up]),
        "asynchronous_step_ms": middle("steps_ms"),
        "timed_loops": len(runs),
        "glue_ms": middle("steps_ms") - middle("denoiser_ms"),
        "host_ms": middle("host_ms"),
    }


def _per_step(runs: list[Run], name: str) -> list[float]:
    """The medians over the runs of one of the times of each step."""
    return [statistics.median(values) for values in zip(*(getattr(run, name) for run in runs), strict=True)]


def relative_deviation(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = (latents.double() - reference.double()).norm()
    return float(difference / reference.double().norm())
