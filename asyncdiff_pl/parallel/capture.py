"""CUDA graphs of calls without gradients: thousands of kernels in one launch.

A graph holds kernels with the addresses of their tensors. So what changes from call to call is copied into tensors that
stay (`StaticInputs`), results are read where the recording left them, and all else is as it was when it was recorded:
what that is for the arguments tells `frozen`, for the network `fingerprint.py`.

Source: CUDA graphs in PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Result = TypeVar("Result")


class CannotCapture(Exception):
    """Says why there is no graph; the call itself can go on without one."""


class Recording(Protocol):
    """What was recorded."""

    @property
    def is_sound(self) -> bool:
        """Whether it can be replayed; otherwise it would write over what is in use, and is only to be dropped."""

    def replay(self) -> None:
        """Runs it again on the tensors that it was recorded with."""

    def drop(self) -> None:
        """Gives its memory back; it cannot be replayed any more."""


class Recorder(Protocol):
    """Makes recordings that share their memory, so that one runs at a time."""

    def rehearse(self, run: Callable[[], Result], copy: Callable[[Result], Result]) -> tuple[Result, bool]:
        """Runs what will be recorded, in the memory of the recordings that there are.

        Args:
            run: Launches on the current stream; what it leaves behind it takes `lasting` memory for.
            copy: Copies what `run` returned.

        Returns:
            The copy of what `run` returned, and whether nothing of that memory is in use. If something is,
            `begin_anew` must be called, on all ranks.
        """

    def begin_anew(self) -> None:
        """Makes all recordings so far unsound, and rehearses in memory of its own from now on."""

    def record(self, run: Callable[[], Result]) -> tuple[Recording, Result]:
        """Records what `run` launches. It has run before: what it needs once is there.

        Returns:
            The recording, and what `run` returned: the tensors that each replay writes.

        Raises:
            CannotCapture: It does something that a graph cannot hold.
        """


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._num_alive = 0
        self._shares = True
        self.generation = object()
        """Another one once earlier recordings must not be replayed any more."""

    def rehearse(self, run: Callable[[], Result], copy: Callable[[Result], Result]) -> tuple[Result, bool]:
        """Runs what will be recorded, in the memory of the recordings that there are: none of them runs meanwhile.

        In memory of its own each kind of step would take, the first time, as much as all recordings together.

        Args:
            run: Launches on the current stream, and waits for all messages that it posts; what it leaves behind it
                takes `lasting` memory for.
            copy: Copies what `run` returned.

        Returns:
            The copy of what `run` returned, and whether nothing of that memory is in use: a replay would write over
            it. What the first call gives is no copy.
        """
        if not self._num_alive or not self._shares:
            # libraries take what they keep from elsewhere
            return run(), True
        taken = self._taken()
        with torch.cuda.device(self.device), _RecordingMemory(self._pool, self._stream):
            result = run()
        found = copy(result)
        del result
        return found, self._taken() <= taken

    def begin_anew(self) -> None:
        """Makes all recordings so far unsound, and rehearses in memory of its own from now on."""
        self._shares, self.generation = False, object()
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Result]) -> tuple[Recording, Result]:
        """Records what `run` launches; nothing of it runs now.

        Args:
            run: Launches on the current stream, and synchronises with nothing.

        Returns:
            The graph, and what `run` returned: the tensors that each replay writes. They hold nothing yet, and keep
            what a replay wrote until another recording of this recorder is replayed.

        Raises:
            CannotCapture: It does something that a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        # where ending a failed capture raises, torch leaves its stream the current one: the outer context undoes it
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with self._recording(graph, self._pool):
                    result = run()
            except RuntimeError as error:
                self._recover()
                raise CannotCapture(f"a step could not be recorded ({_first_error(error)})") from error
        self._num_alive += 1
        return _CudaRecording(graph, self), result

    def _taken(self) -> int:
        """Bytes of recordings' memory that tensors have."""
        torch.cuda.synchronize(self.device)
        segments = torch.cuda.memory_snapshot()
        return sum(each["allocated_size"] for each in segments if tuple(each["segment_pool_id"]) == self._pool)

    def forget(self) -> None:
        """Counts one recording less."""
        self._num_alive -= 1
        if self._num_alive == 0:
            # memory of the last graph is given back in time of its own, and the handle with it
            self._pool = torch.cuda.graph_pool_handle()

    def _recover(self) -> None:
        """Has torch's random numbers drawn outside of graphs again: a broken capture leaves them in it until 2.12."""
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.stream(torch.cuda.current_stream(self.device))
        with contextlib.suppress(RuntimeError), stream, self._recording(graph, None):
            torch.zeros(1, device=self.device)

    @contextlib.contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # the first of several graphs makes the tensors that say where random numbers are, and all write into them:
            # made in inference mode, they could not be written outside it
            with torch.inference_mode(False):
                # process groups, data loaders and watches go on in threads of their own
                stack.enter_context(torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"))
            yield


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that everything is recorded on: libraries keep a workspace for each one that they ever ran on."""
    stream = torch.cuda.Stream(device)
    with torch.inference_mode(False), torch.cuda.stream(stream):
        # cuBLAS takes its workspace now, and not out of a recording's memory, which it would never give back
        square = torch.ones(16, 16, device=device)
        square @ square
    stream.synchronize()
    return stream


class _RecordingMemory:
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


_memory: ContextVar[_RecordingMemory | None] = ContextVar("memory", default=None)


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


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, recorder: CudaRecorder) -> None:
        self._graph = graph
        self._recorder = recorder
        self._generation = recorder.generation

    @property
    def is_sound(self) -> bool:
        """Whether no tensor that is in use lies where it writes."""
        return self._generation is self._recorder.generation

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        self._graph.replay()

    def drop(self) -> None:
        """Waits until no replay is under way, then frees the graph."""
        torch.cuda.synchronize(self._recorder.device)
        self._graph.reset()
        self._recorder.forget()


def has_graphs(device: torch.device) -> bool:
    """Whether there are CUDA graphs on a device."""
    return device.type == "cuda" and torch.version.hip is None


def may_capture(is_wanted: bool | None) -> bool:
    """Whether steps may come to be recorded.

    Args:
        is_wanted: What was asked for; None for where there is an NVIDIA GPU.
    """
    return is_wanted if is_wanted is not None else torch.cuda.is_available() and has_graphs(torch.device("cuda"))


def recorder_for(device: torch.device, backend: str | None) -> Recorder:
    """A recorder for a device.

    Args:
        device: Where calls are computed.
        backend: What ranks exchange tensors with; None where there is one rank alone.

    Raises:
        CannotCapture: There are no graphs on that device, or messages cannot be in them.
    """
    if not has_graphs(device):
        raise CannotCapture(f"it needs an NVIDIA GPU, and the denoiser is on {device.type}")
    if backend not in (None, "nccl"):
        raise CannotCapture(f"messages between ranks must go over nccl, and the process group's backend is {backend}")
    return CudaRecorder(device)


class StaticInputs:
    """Tensors that a recording reads: they stay where they are, and each call's are copied into them.

    Args:
        given: Arguments of a call, nested in any way.
        device: Where all tensors are to be; small ones may be given on the CPU.
    """

    def __init__(self, given: Any, device: torch.device) -> None:
        leaves, self._spec = tree_flatten(given)
        # tensors made in inference mode could not be written outside it
        with torch.inference_mode(False):
            self._leaves = [
                torch.empty_like(leaf, device=device, requires_grad=False) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]
        self.load(given)

    @property
    def given(self) -> Any:
        """The arguments with these tensors; each time in containers of their own, since some networks take out."""
        return tree_unflatten(self._leaves, self._spec)

    def load(self, given: Any) -> None:
        """Copies in another call's tensors, without waiting for the GPU.

        Args:
            given: Arguments of which `frozen` gives the same.
        """
        pairs = [
            (to, leaf)
            for to, leaf in zip(self._leaves, tree_leaves(given), strict=True)
            if isinstance(leaf, torch.Tensor)
        ]
        here = [pair for pair in pairs if pair[1].device == pair[0].device]
        if here:
            torch._foreach_copy_([to for to, _ in here], [leaf for _, leaf in here])
        for to, leaf in pairs:
            if leaf.device != to.device:
                # from pinned memory the CPU need not wait, and torch reuses it only when the copy is done
                to.copy_(leaf.pin_memory(), non_blocking=True)


def without_cast_cache(device: torch.device) -> torch.autocast:
    """A context of the same precision that casts weights anew in each replay: a cache's would stay as they were.

    Args:
        device: Where the weights are.
    """
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


def frozen(given: Any) -> Hashable:
    """What a replay would keep of a call's arguments: all but the tensors' values.

    Raises:
        CannotCapture: An argument cannot be compared.
    """
    leaves, spec = tree_flatten(given)
    found = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    try:
        hash(found)
    except TypeError:
        kinds = sorted({type(leaf).__name__ for leaf in leaves if type(leaf).__hash__ is None})
        raise CannotCapture(f"the denoiser is given a {' and a '.join(kinds)}, which a graph would freeze") from None
    return found, spec


def _first_error(error: BaseException) -> str:
    """The first line of the error that began it: ending a broken capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n")[0]
