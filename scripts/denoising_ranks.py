"""The ranks of scripts/benchmark_denoising.py: what they tell one another, and how they end when the time is up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GIB = 2**30
PATIENCE = timedelta(minutes=5)
"""How long ranks wait for one that compiles."""
LATE = 60.0
"""Seconds after which a rank that failed ends the run, if others wait for it in vain where it cannot tell them."""


class RankFailed(Exception):
    """Another rank failed in this row, and says why."""


class World:
    """The ranks that torchrun started, or this process alone.

    Args:
        device: `cuda` or `cpu`.
        size: Number of ranks.
    """

    def __init__(self, device: str, size: int) -> None:
        self.size, self.rank = size, int(os.environ.get("RANK", "0"))
        self.num_processes = size
        """How many were started."""
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._group: dist.ProcessGroup | None = None
        if size > 1:
            on_gpu = device == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None)
            # what ranks tell one another beside the pipelines: a CPU waits there, not a GPU
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """What all ranks have, on all of them; waits for the last one.

        Raises:
            RankFailed: Another rank told of a failure in place of its value.
        """
        found = self._gather((value, None))
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise RankFailed(f"rank {rank}: {failure}")
        return [value for value, _ in found]

    def tell_failure(self, text: str) -> str:
        """Tells the others, wherever they gather next, that this rank failed; gives what the first one says."""
        timer = threading.Timer(LATE, os._exit, (1,))
        timer.daemon = True
        timer.start()
        found = self._gather((None, text))
        timer.cancel()
        return next(f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(found) if failure is not None)

    def _gather(self, value: Any) -> list[Any]:
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self._group)
        return found

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> float | None:
        """GPU memory in GiB that was reserved at most, graphs' own included; None without a GPU."""
        return torch.cuda.max_memory_reserved(self.device) / GIB if self.device.type == "cuda" else None

    def take_peak(self) -> float | None:
        """The same, and what is reserved from here on is looked at anew."""
        peak = self.peak()
        if peak is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def close(self) -> None:
        """Ends the connections."""
        if self.size > 1:
            dist.destroy_process_group()


class Clock:
    """Ends all ranks when the time is up, wherever they are.

    Args:
        seconds: How long from here; None for ever.
        world: The ranks.
        at_end: What rank 0 still does.
        leave: Ends the process.
    """

    def __init__(
        self, seconds: float | None, world: World, at_end: Callable[[], None], leave: Callable[[int], Any] = os._exit
    ) -> None:
        self._seconds, self._rank, self._at_end, self._leave = seconds, world.rank, at_end, leave
        self._end, self._timer = float("inf"), None
        if seconds is not None:
            # one moment for all: they run on one machine
            self._end = world.gather(time.time() + seconds)[0]
            self._timer = threading.Timer(max(0.0, self._end - time.time()), self._leave_now)
            self._timer.daemon = True
            self._timer.start()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.time() >= self._end

    def wait(self) -> None:
        """Waits until this process has been ended."""
        assert self._timer is not None
        self._timer.join()

    def stop(self) -> None:
        """Lets the process end by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _leave_now(self) -> None:
        if self._rank == 0:
            print(f"time is up after {self._seconds:g} s: rows that are not here were not measured", flush=True)
            self._at_end()
        self._leave(0)
