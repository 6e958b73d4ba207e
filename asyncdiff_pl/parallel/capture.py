"""CUDA graphs of calls without gradients: thousands of kernels in one launch.

A graph holds kernels with the addresses of their tensors. So what changes from call to call is copied into tensors that
stay, results are read where the recording left them, and all else is as it was when it was recorded: for the arguments
see `recorded_inputs.py`, for the network `fingerprint.py`.

Source: CUDA graphs in PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from asyncdiff_pl.parallel.recording_memory import RecordingMemory

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
        with torch.cuda.device(self.device), RecordingMemory(self._pool, self._stream):
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


def without_cast_cache(device: torch.device) -> torch.autocast:
    """A context of the same precision that casts weights anew in each replay: a cache's would stay as they were.

    Args:
        device: Where the weights are.
    """
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


def _first_error(error: BaseException) -> str:
    """The first line of the error that began it: ending a broken capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n")[0]
