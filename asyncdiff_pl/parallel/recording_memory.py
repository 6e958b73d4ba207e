"""Memory that recordings share, for what runs between their replays: the first step of each kind.

A step runs as it is once, before it is recorded. In memory of its own it would take as much as all recordings together,
which rest meanwhile; in theirs it takes nothing. What it leaves behind must not lie there: a replay writes over it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch


class RecordingMemory:
    """A context in which all memory that this thread takes is that of recordings, on their stream."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._pool, self._stream = pool, stream
        self._before = torch.cuda.current_stream(stream.device)

    def __enter__(self) -> None:
        self._stream.wait_stream(self._before)
        self._entered = _memory.set(self)
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()
        _memory.reset(self._entered)
        self._before.wait_stream(self._stream)

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Within this context memory is taken as it was before."""
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        # as torch.cuda.use_mem_pool does, for a pool that graphs have
        torch.cuda.set_stream(self._stream)
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._stream.device_index, self._pool)

    def _end(self) -> None:
        torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        torch._C._cuda_releasePool(self._stream.device_index, self._pool)
        torch.cuda.set_stream(self._before)


_memory: ContextVar[RecordingMemory | None] = ContextVar("memory", default=None)


def is_rehearsing() -> bool:
    """Whether this thread runs a step in the memory of recordings."""
    return _memory.get() is not None


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """A context for memory that a step takes for what it leaves behind: what others do not write over.

    Tensors that it makes hold nothing yet: outside of a step's stream nothing is to be computed.
    """
    memory = _memory.get()
    with contextlib.nullcontext() if memory is None else memory.left(), torch.inference_mode(False):
        # tensors made in inference mode could not be written outside of it
        yield
