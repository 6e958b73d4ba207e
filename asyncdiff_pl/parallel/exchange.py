"""How tensors get from rank to rank: over process groups, or within one process that plays all ranks.

Boundary tensors go from one rank to another, never to all, as soon as they exist and beside the computation. NCCL
matches the messages of a pair of ranks by their order, so all ranks keep to one: that in which the tensors are
expected to be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from asyncdiff_pl.parallel.layout import Groups
from asyncdiff_pl.parallel.recording_memory import is_rehearsing
from asyncdiff_pl.parallel.watch import Watch


@dataclass(frozen=True)
class Message:
    """A boundary tensor on its way.

    Args:
        value: Number of the value.
        source: Stage rank that makes it.
        target: Stage rank that consumes it.
    """

    value: int
    source: int
    target: int


class Inbox(Protocol):
    """Where a rank takes in what others send to it."""

    rank: int

    def incoming(self, value: int) -> torch.Tensor:
        """The buffer that a value is to be received into."""

    def expect(self, value: int, pending: Pending) -> None:
        """Notes what must be waited for before that buffer is read."""


@dataclass(frozen=True)
class Pending:
    """A message that was posted and may still be under way."""

    work: dist.Work
    description: str
    timeout: timedelta | None

    def wait(self) -> None:
        """Waits; on a GPU only the stream does.

        Raises:
            RuntimeError: The message did not come in time.
        """
        try:
            if self.timeout is None:
                self.work.wait()
            else:
                self.work.wait(self.timeout)
        except RuntimeError as error:
            raise RuntimeError(f"{self.description} did not come through: {error}") from error


class Exchange:
    """Messages of one rank over the process groups of its pipeline.

    Args:
        groups: The process groups.
        timeout: How long to wait for a message; None leaves it to the group.
    """

    def __init__(self, groups: Groups, timeout: timedelta | None = None) -> None:
        self.groups = groups
        self.timeout = timeout
        self.sent_bytes = 0
        """Bytes of boundary tensors that this rank has sent."""
        self._order: list[Message] = []
        self._next = 0
        self._step = 0
        self._inbox: Inbox | None = None
        self._sends: list[tuple[Pending, torch.Tensor]] = []
        self._watch = Watch(timeout) if timeout is not None and dist.get_backend() == "nccl" else None

    def begin(self, inbox: Inbox, messages: Sequence[Message], step: int) -> None:
        """Begins a step in which boundary tensors travel.

        Args:
            inbox: This rank's inbox.
            messages: All messages of the step, in the order that all ranks keep to.
            step: Number of the step, for reports.
        """
        self.join()
        self._inbox, self._step, self._next = inbox, step, 0
        self._order = [message for message in messages if inbox.rank in (message.source, message.target)]
        self._receive()

    def send(self, value: int, tensor: torch.Tensor) -> None:
        """Sends a value that this rank just made to all who consume it."""
        assert self._inbox is not None
        # a copy: what follows may write into the tensor before it has left (FreeU scales its input in place)
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        while self._next < len(self._order) and self._order[self._next].value == value:
            message = self._order[self._next]
            work = dist.isend(tensor, group=self.groups.half, group_dst=message.target)
            self._sends.append((self._pending(work, message), tensor))
            self.sent_bytes += tensor.nbytes
            self._next += 1
        self._receive()

    def finish(self) -> None:
        """Ends the step: everything is posted, nothing is waited for."""
        assert self._next == len(self._order), "a value that others consume was not made"

    def join(self) -> None:
        """Waits until this rank's messages have left; on a GPU only the stream does."""
        for pending, _ in self._sends:
            pending.wait()
        self._sends.clear()

    def abandon(self) -> None:
        """Forgets messages of a recording that came to nothing."""
        self._sends.clear()

    def watch_replay(self, step: int) -> None:
        """Watches messages that were posted by a replay, which nothing else tells of.

        Args:
            step: Number of the step, for reports.
        """
        if self._watch is not None:
            event = torch.cuda.Event()
            event.record()
            self._watch.add(_Replayed(event), f"rank {dist.get_rank()}, step {step}: a replayed step with its messages")

    def swap(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor], what: str) -> list[Pending]:
        """Posts messages from and to ranks of the same half that will be waited for at once.

        Args:
            sends: What each of some ranks gets, contiguous; it must stay as it is until the messages were waited for.
            receives: Buffers for what each of some ranks sends.
            what: What travels, for reports.

        Returns:
            The messages, all of which must be waited for.
        """
        return self.swap_together([(sends, receives)], what, is_waited_for=True)

    def swap_together(
        self,
        parcels: Sequence[tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]]],
        what: str,
        is_waited_for: bool,
    ) -> list[Pending]:
        """Posts several such messages for each of the ranks at once, which NCCL launches together.

        Args:
            parcels: As for `swap`, on all ranks in the same order.
            what: What travels, for reports.
            is_waited_for: Whether the computation waits for them, rather than go on beside them.
        """
        group = self.groups.waited if is_waited_for else self.groups.half
        posts = []
        for sends, receives in parcels:
            posts += [dist.P2POp(dist.isend, tensor, group=group, group_peer=rank) for rank, tensor in sends.items()]
            posts += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=rank) for rank, tensor in receives.items()]
            self.sent_bytes += sum(tensor.nbytes for tensor in sends.values())
        if not posts:
            return []
        text = f"rank {dist.get_rank()}: {what}"
        return [self._watched(work, text) for work in dist.batch_isend_irecv(posts)]

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Gives tensors of one rank of the pipeline to all of it, in place.

        Args:
            tensors: Contiguous tensors, on every rank of the same shapes.
            source: Rank within the pipeline.
        """
        for tensor in tensors:
            text = f"rank {dist.get_rank()}, step {self._step}: tensors of rank {source} of the pipeline"
            work: Any = dist.broadcast(tensor, group=self.groups.pipeline, group_src=source, async_op=True)
            self._watched(work, text).wait()

    def gather_halves(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Both halves of the guidance batch, in order, of which this rank has one."""
        halves: list[list[torch.Tensor]] = [[], []]
        for tensor in tensors:
            parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in halves]
            dist.all_gather(parts, tensor.contiguous(), group=self.groups.guidance)
            for half, part in zip(halves, parts, strict=True):
                half.append(part)
        return halves

    def gather_all(self, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        """What each rank of the pipeline has, in order.

        Args:
            tensor: This rank's, of the same shape on all of them.
            what: What it is, for reports.
        """
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.groups.pipeline))]
        work: Any = dist.all_gather(parts, tensor, group=self.groups.pipeline, async_op=True)
        self._watched(work, f"rank {dist.get_rank()}: {what}").wait()
        self.sent_bytes += tensor.nbytes * (len(parts) - 1)
        return parts

    def spread(self, numbers: torch.Tensor) -> torch.Tensor:
        """The largest distance between the ranks of the pipeline, for each of some numbers."""
        high, low = numbers.clone(), numbers.clone()
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.groups.pipeline)
        dist.all_reduce(low, dist.ReduceOp.MIN, group=self.groups.pipeline)
        return high - low

    def all_agree(self, holds: bool) -> bool:
        """Whether something holds on all ranks of the pipeline; each asks, and waits for the others."""
        kind = "cuda" if dist.get_backend(self.groups.pipeline) == "nccl" else "cpu"
        return not bool(self.add_up(torch.tensor([0.0 if holds else 1.0], device=kind)))

    def add_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of the pipeline of each of some numbers, the same on all of them."""
        total = numbers.clone()
        text = f"rank {dist.get_rank()}, step {self._step}: a sum over the ranks of the pipeline"
        work: Any = dist.all_reduce(total, group=self.groups.pipeline, async_op=True)
        self._watched(work, text).wait()
        return total

    def close(self) -> None:
        """Stops watching for lost messages."""
        if self._watch is not None:
            self._watch.stop()

    def drop(self) -> None:
        """Waits for what is under way, so that a new sample begins with empty lines."""
        self.join()

    def _receive(self) -> None:
        """Posts what comes before this rank's next own message."""
        inbox = self._inbox
        assert inbox is not None
        while self._next < len(self._order) and self._order[self._next].target == inbox.rank:
            message = self._order[self._next]
            buffer = inbox.incoming(message.value)
            work: Any = dist.irecv(buffer, group=self.groups.half, group_src=message.source)
            inbox.expect(message.value, self._pending(work, message))
            self._next += 1

    def _pending(self, work: dist.Work, message: Message) -> Pending:
        text = (
            f"rank {dist.get_rank()}, step {self._step}: boundary tensor {message.value} "
            f"from stage rank {message.source} to {message.target}"
        )
        return self._watched(work, text)

    def _watched(self, work: dist.Work, text: str) -> Pending:
        if self._watch is None:
            return Pending(work, text, self.timeout)
        # one that is being recorded does not run, and must not be asked; of a rehearsal it would hold the memory, and
        # that is watched as a whole, as replays are
        if not torch.cuda.is_current_stream_capturing() and not is_rehearsing():
            self._watch.add(work, text)
        # with a timeout of its own NCCL would make the CPU wait
        return Pending(work, text, None)


@dataclass(frozen=True)
class _Replayed:
    """What a watch asks of a replay."""

    event: torch.cuda.Event

    def is_completed(self) -> bool:
        """Whether all of it has run."""
        return self.event.query()


class LocalExchange:
    """The same within one process that plays all ranks, one after another."""

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self.sent_bytes = 0
        self._inboxes = {inbox.rank: inbox for inbox in inboxes}
        self._messages: Sequence[Message] = ()

    def begin(self, inbox: Inbox, messages: Sequence[Message], step: int) -> None:
        """Begins one rank's step."""
        self._messages = messages

    def send(self, value: int, tensor: torch.Tensor) -> None:
        """Copies a value into the inboxes of those who consume it."""
        for message in self._messages:
            if message.value == value:
                self._inboxes[message.target].incoming(value).copy_(tensor)
                self.sent_bytes += tensor.nbytes

    def finish(self) -> None:
        """Ends the rank's step."""

    def join(self) -> None:
        """Nothing is ever under way."""

    def drop(self) -> None:
        """Nothing is ever under way."""

    def abandon(self) -> None:
        """Nothing is ever under way."""
