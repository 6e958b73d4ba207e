"""What one rank holds of the boundary tensors: those that it consumes, twice."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import torch

from asyncdiff_pl.parallel.exchange import Message, Pending
from asyncdiff_pl.parallel.recording_memory import lasting
from asyncdiff_pl.parallel.stages.boundary import Boundary


class Worker:
    """One stage rank's buffers: what it reads in this step, and what comes in for the next.

    Args:
        rank: Its number among the ranks that share a half of the guidance batch.
        stage: The stage that it computes.
        consumed: Values of other stages that it reads.
    """

    def __init__(self, rank: int, stage: int, consumed: Collection[int]) -> None:
        self.rank = rank
        self.stage = stage
        self.consumed = frozenset(consumed)
        self._current: dict[int, torch.Tensor] = {}
        self._next: dict[int, torch.Tensor] = {}
        self._expected: dict[int, Pending] = {}
        self._pending: dict[int, Pending] = {}
        self._number_format: Hashable = False
        self.parity = 0
        """Which of the two buffers of each value is read."""
        self.held: object = object()
        """Another one when the buffers are others: a recording has their addresses."""

    def store(self, value: int, tensor: torch.Tensor) -> None:
        """Keeps a copy of a value that this rank computed itself, in an exact step."""
        kept = self._current.get(value)
        # the number format may be another one, too: autocast does not show in the denoiser's inputs
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            self._allocate(value, tensor, tensor.device)
        self._current[value].copy_(tensor)

    def prepare(self, likes: Mapping[int, torch.Tensor], device: torch.device) -> None:
        """Makes the buffers of all that is read, for a rank that never has the values themselves.

        Args:
            likes: For each value a tensor like it.
            device: Where the buffers are to be.
        """
        for value in self.consumed:
            self._allocate(value, likes[value], device)

    def current(self, value: int) -> torch.Tensor:
        """The buffer of a value that is read in this round."""
        return self._current[value]

    def read(self, value: int) -> torch.Tensor:
        """The newest copy of another stage's value; waits for it if it is still under way."""
        pending = self._pending.pop(value, None)
        if pending is not None:
            pending.wait()
        return self._current[value]

    def incoming(self, value: int) -> torch.Tensor:
        """The buffer that a value is to be received into; it is read from the next round on."""
        return self._next[value]

    def expect(self, value: int, pending: Pending) -> None:
        """Notes what must be waited for before that buffer is read."""
        self._expected[value] = pending

    def turn_over(self) -> None:
        """Begins the next round: what came in is current."""
        self.settle()
        self._swap()
        self._pending, self._expected = self._expected, {}

    def restart(self, number_format: Hashable) -> None:
        """Begins with the same one of the two buffers each time that all values are to be stored anew.

        Args:
            number_format: Decides, beside the inputs, the number formats of the values.
        """
        # a buffer that nobody read may still be received into
        self.settle()
        if number_format != self._number_format:
            # on all ranks, whether they have buffers or not
            self._number_format, self.held = number_format, object()
        if self.parity:
            self._swap()

    def join(self) -> None:
        """Waits for all that is under way; on a GPU only the stream does."""
        self.settle()
        for pending in self._expected.values():
            pending.wait()
        self._expected.clear()

    def abandon(self) -> None:
        """Forgets what is under way in a recording that came to nothing."""
        self._pending.clear()
        self._expected.clear()

    def settle(self) -> None:
        """Waits for what nobody has read, so that its buffer can be received into again."""
        for pending in self._pending.values():
            pending.wait()
        self._pending.clear()

    def drop(self) -> None:
        """Waits for all that is under way and forgets all values."""
        self.join()
        self._current.clear()
        self._next.clear()
        self.held = object()

    def _allocate(self, value: int, like: torch.Tensor, device: torch.device) -> None:
        with lasting():
            self._current[value] = torch.empty(like.shape, dtype=like.dtype, device=device)
            self._next[value] = torch.empty_like(self._current[value])
        self.held = object()

    def _swap(self) -> None:
        self._current, self._next = self._next, self._current
        self.parity ^= 1


def stage_of(rank: int, stages: int, output_stage: int) -> int:
    """The stage that a stage rank computes: its own, or for the extra rank of stride 2 the output stage."""
    return rank if rank < stages else output_stage


def make_workers(ranks: Sequence[int], stages: int, boundary: Boundary) -> list[Worker]:
    """Workers for some stage ranks."""
    found = []
    for rank in ranks:
        stage = stage_of(rank, stages, boundary.output_stage)
        found.append(Worker(rank, stage, boundary.consumed_by(stage)))
    return found


def messages(boundary: Boundary, stages: int, stage_ranks: int) -> list[Message]:
    """The messages of one round, in the order that all ranks keep to."""
    found = []
    for value in boundary.order:
        source = boundary.maker[value]
        assert source is not None
        for target in range(stage_ranks):
            if stage_of(target, stages, boundary.output_stage) in boundary.consumers[value]:
                found.append(Message(value, source, target))
    return found
