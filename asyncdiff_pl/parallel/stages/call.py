"""What the hooks of units and containers do while the denoiser runs for one rank's stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from asyncdiff_pl.parallel.exchange import Exchange, LocalExchange
from asyncdiff_pl.parallel.phases import Phases
from asyncdiff_pl.parallel.stages.absent import Absent
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.stages.relay import RelayWorker
from asyncdiff_pl.parallel.stages.units import Output
from asyncdiff_pl.parallel.stages.worker import Worker
from asyncdiff_pl.parallel.warm_up import Drift, Span


@dataclass
class Stream:
    """One of the denoiser calls that a step makes: it has its own stale values."""

    signature: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the denoiser computes."""
    begins: int = 0
    """Step at which its warm-up began."""
    span: Span = field(default_factory=lambda: Span(1, None))
    """How long that warm-up may last."""
    warm_up: int | None = None
    """Its exact steps; None while their number is not known."""
    next_position: int | None = None
    """Step at which it must be called next for its stale values to be of the step before; None in a new sample."""
    program: Program | None = None
    is_whole: bool = False
    """Whether the call in work is given to both groups of a guidance axis whole, since it has no guidance batch."""
    workers: list[list[Worker]] = field(default_factory=list)
    """For each half of the guidance batch that this process computes, its stage ranks."""
    exchanges: list[Exchange | LocalExchange] = field(default_factory=list)
    likes: dict[int, torch.Tensor] = field(default_factory=dict)
    """For each value a tensor on the meta device like it."""
    result: tuple[list[torch.Tensor], TreeSpec] | None = None
    """Tensors like those of a result, for one half, on the meta device; and how a result is nested."""
    ahead: list[list[torch.Tensor]] = field(default_factory=list)
    """Estimates of the next step that were made in this one, one a half."""
    phases: Phases | None = None
    """Recordings of its steps; None where they are not captured."""

    @property
    def all_workers(self) -> list[Worker]:
        """The stage ranks of all halves."""
        return [worker for half in self.workers for worker in half]

    @property
    def sent_bytes(self) -> int:
        """Bytes of boundary tensors that its exchanges were given to send."""
        return sum(exchange.sent_bytes for exchange in self.exchanges)

    @property
    def held(self) -> tuple[object, ...]:
        """Tells the buffers of its stage ranks from others."""
        return tuple(worker.held for worker in self.all_workers)

    def join(self) -> None:
        """Waits for all messages that are under way; on a GPU only the stream does."""
        for part in (*self.exchanges, *self.all_workers):
            part.join()

    def abandon(self) -> None:
        """Forgets the messages of a recording that came to nothing."""
        for part in (*self.exchanges, *self.all_workers):
            part.abandon()

    def drop(self) -> None:
        """Forgets all recordings and all stale values."""
        if self.phases is not None:
            self.phases.drop()
        for worker in self.all_workers:
            worker.drop()
        for exchange in self.exchanges:
            exchange.drop()


@dataclass
class StageCall:
    """A forward of the denoiser for one stage, or for all of them.

    Args:
        stream: Which of a step's denoiser calls it is.
        half: Position of the half of the guidance batch among those that this process computes.
        device: Where the denoiser computes.
        worker: The rank whose stage is computed; None computes everything, and keeps what the ranks will consume.
        sends: Whether boundary tensors travel.
        drift: Takes the change of what the ranks will consume since the step before; None compares nothing.
        first_rank: Number of the half's first rank within the pipeline.
    """

    stream: Stream
    half: int
    device: torch.device
    worker: Worker | RelayWorker | None = None
    sends: bool = False
    drift: Drift | None = None
    first_rank: int = 0
    _calls: dict[str, int] = field(default_factory=dict)

    def run_piece(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a unit of the own stage; stands in for one of another stage."""
        program = self._program
        if name not in program.numbers:
            return call(*args, **kwargs)
        number = program.numbers[name]
        described = self._next_output(name, program.graph.units[number].outputs)
        if self.worker is not None and program.boundary.owner[number] != self.worker.stage:
            return self._stand_in(described, (args, kwargs))
        output = call(*args, **kwargs)
        self._made(described, output)
        return output

    def run_container(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs through a container with units of the own stage; passes over another."""
        program = self._program
        if name not in program.graph.containers:
            return call(*args, **kwargs)
        described = self._next_output(name, program.graph.containers[name].outputs)
        if self.worker is not None and name not in program.runs[self.worker.stage]:
            return self._stand_in(described, (args, kwargs))
        output = call(*args, **kwargs)
        if not described.made:
            return output
        self._made(described, output)
        return output if self.worker is None else self._with_stale_glue(described, output)

    @property
    def _program(self) -> Program:
        assert self.stream.program is not None
        return self.stream.program

    def _next_output(self, name: str, outputs: list[Output]) -> Output:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return outputs[call]

    def _made(self, described: Output, output: Any) -> None:
        """Takes note of the values that a module just made."""
        boundary = self._program.boundary
        leaves = tree_leaves(output)
        for at in described.made:
            value = described.leaves[at].value
            assert value is not None
            if self.worker is None:
                self.stream.likes[value] = like(leaves[at])
                for worker in self.stream.workers[self.half]:
                    if value in worker.consumed:
                        if self.drift is not None:
                            self.drift.compare(self.first_rank + worker.rank, worker.read(value), leaves[at])
                        worker.store(value, leaves[at])
            elif (
                self.sends
                and value in boundary.consumers
                # the extra rank of stride 2 computes the output stage as well, for nobody else
                and boundary.maker[value] == self.worker.stage == self.worker.rank
            ):
                self.stream.exchanges[self.half].send(value, leaves[at])

    def _stand_in(self, described: Output, inputs: Any) -> Any:
        """What a module returns that another rank computes: stale where it is consumed here, else absent."""
        worker = self.worker
        assert worker is not None
        leaves: list[Any] = []
        arguments: list[Any] | None = None
        for leaf in described.leaves:
            if leaf.value is not None:
                if leaf.value in worker.consumed:
                    leaves.append(worker.read(leaf.value))
                else:
                    leaves.append(Absent(self.stream.likes[leaf.value], self.device))
            elif leaf.argument is not None:
                arguments = tree_leaves(inputs) if arguments is None else arguments
                leaves.append(arguments[leaf.argument])
            else:
                leaves.append(leaf.constant)
        return tree_unflatten(leaves, described.spec)

    def _with_stale_glue(self, described: Output, output: Any) -> Any:
        """Puts in what another stage's glue at the container's end made, where it is consumed here."""
        worker = self.worker
        assert worker is not None
        leaves, spec = tree_flatten(output)
        for at in described.made:
            value = described.leaves[at].value
            if value in worker.consumed:
                leaves[at] = worker.read(value)
        return tree_unflatten(leaves, spec)


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device of the same shape, strides and number format."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
