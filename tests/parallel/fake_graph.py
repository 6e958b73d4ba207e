"""Recordings without a GPU: operations are written down with the very tensors that they read and wrote, and run again.

Like a CUDA graph, a replay runs no Python of the network: numbers, branches and addresses are as they were recorded.
Like a capture, recording changes no tensor that was there before. And what a rehearsal leaves in recordings' memory is
written over, as replays would.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import leaves, mapped

from asyncdiff_pl.parallel import recording_memory, recordings
from asyncdiff_pl.parallel.capture import CannotCapture, recorder_for
from asyncdiff_pl.parallel.stages.absent import Absent

# messages that are received may be waited for at once, since all ranks post in one order
SENDS = {"c10d.send.default"}
MADE_ANEW = {"aten.empty", "aten.empty_strided", "aten.empty_like", "aten.new_empty", "aten.new_empty_strided"}
# these make the CPU wait for the device
FORBIDDEN = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}


class FakeRecorder:
    """Records what torch runs on the CPU."""

    def __init__(self) -> None:
        self.replays = 0
        self.rehearsals = 0
        self.alive = 0
        self.generation = 0
        self.unclean = 0
        """After which rehearsal something is found in recordings' memory; 0 for none."""

    def rehearse(self, run: Callable[[], Any], copy: Callable[[Any], Any]) -> tuple[Any, bool]:
        if not self.alive:
            return run(), True
        self.rehearsals += 1
        scratch = _Scratch()
        entered = recording_memory._memory.set(scratch)
        try:
            with scratch:
                found = run()
        finally:
            recording_memory._memory.reset(entered)
        found = copy(found)
        scratch.write_over()
        is_clean = self.rehearsals != self.unclean
        return found, is_clean

    def begin_anew(self) -> None:
        self.generation += 1

    def record(self, run: Callable[[], Any]) -> tuple["FakeRecording", Any]:
        writer = _Writer()
        try:
            with writer:
                result = run()
        finally:
            writer.undo()
        self.alive += 1
        return FakeRecording(self, writer.operations), result


class FakeRecording:
    def __init__(self, recorder: FakeRecorder, operations: list[tuple]) -> None:
        self.recorder = recorder
        self.generation = recorder.generation
        self.operations = operations

    @property
    def is_sound(self) -> bool:
        return self.generation == self.recorder.generation

    def replay(self) -> None:
        assert self.is_sound, "a recording was replayed that writes over what is in use"
        assert self.operations, "a recording was replayed that had been dropped"
        self.recorder.replays += 1
        sends = []
        for function, args, kwargs, output, fresh in self.operations:
            found = function(*args, **kwargs)
            if function.namespace == "c10d":
                works = [leaf for leaf in leaves(found) if hasattr(leaf, "wait") and not _is_tensor(leaf)]
                if str(function) in SENDS:
                    sends += works
                else:
                    for work in works:
                        work.wait()
            if function is torch.ops._c10d_functional.all_reduce.default:
                torch.ops._c10d_functional.wait_tensor(found)
            if fresh:
                for kept, new in zip(leaves(output), leaves(found), strict=True):
                    if _is_tensor(kept):
                        kept.copy_(new)
        for work in sends:
            work.wait()

    def drop(self) -> None:
        assert self.operations, "a recording was dropped twice"
        self.operations = []
        self.recorder.alive -= 1


class _Scratch(TorchDispatchMode):
    """Notes what is made, but for what is to last."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, torch.Tensor] = {}
        self.is_left = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented
        output = function(*args, **(kwargs or {}))
        if not self.is_left:
            given = {_storage(leaf) for leaf in leaves((args, kwargs)) if _is_tensor(leaf)}
            self.made |= {
                _storage(leaf): leaf
                for leaf in leaves(output)
                if _is_tensor(leaf) and leaf.device.type == "cpu" and _storage(leaf) not in given
            }
        return output

    @contextlib.contextmanager
    def left(self):
        self.is_left = True
        try:
            yield
        finally:
            self.is_left = False

    def write_over(self) -> None:
        with torch.inference_mode():
            for tensor in self.made.values():
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                whole.fill_(0xFF)


class _Writer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.own: dict[int, torch.Tensor] = {}
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            # what it runs on plain tensors comes here again
            return NotImplemented
        if str(function) in FORBIDDEN:
            raise CannotCapture(f"{function} makes the CPU wait")
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, Absent) for tensor in given):
            return function(*args, **kwargs)
        mutates = function._schema.is_mutable or function.namespace == "c10d"
        if mutates:
            self._keep(given)
        output = function(*args, **kwargs)
        if str(function.overloadpacket) in MADE_ANEW:
            # what it holds is nobody's business, and what was written into it since is not to be lost
            self._adopt(output)
            return output
        storages = {_storage(tensor) for tensor in given}
        fresh = any(_is_tensor(leaf) and _storage(leaf) not in storages for leaf in leaves(output))
        if mutates or fresh:
            # lists are the caller's, who may go on with them
            self.operations.append(
                (function, mapped(_same, args), mapped(_same, kwargs), output, fresh and not mutates)
            )
        if fresh:
            self._adopt(output)
        return output

    def undo(self) -> None:
        """Gives all tensors that were there before what they held."""
        for tensor, held in self.before.values():
            tensor.copy_(held)

    def _keep(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if _storage(tensor) not in self.own and _storage(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[_storage(tensor)] = whole, whole.clone()

    def _adopt(self, output: Any) -> None:
        # held, so that no other tensor gets the same place
        self.own |= {_storage(leaf): leaf for leaf in leaves(output) if _is_tensor(leaf)}


def _same(leaf: Any) -> Any:
    return leaf


def _is_tensor(leaf: Any) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def captured(recorder: FakeRecorder):
    """Has steps recorded on the CPU, where they are captured."""
    with patch.object(recordings, recorder_for.__name__, lambda device, backend: recorder):
        yield recorder
