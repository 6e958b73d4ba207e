"""What patches tell each other, layer by layer: at once, or for the next step while this one goes on.

All ranks run through the same layers in the same order, and each of them posts its messages of a layer when it comes
to it: that is the order which they keep to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from asyncdiff_pl.parallel.exchange import Pending
from asyncdiff_pl.parallel.patches.swap import Parcels, Swap, Trade
from asyncdiff_pl.parallel.recording_memory import lasting

BATCH_BYTES = 8 * 2**20
"""So much of what travels beside the computation goes together, as one launch in place of many."""


@dataclass
class _Layer:
    """What one layer holds of other patches, and of the own ones: for this step and for the next."""

    others: list[Parcels | None] = field(default_factory=lambda: [None, None])
    own: list[list[torch.Tensor] | None] = field(default_factory=lambda: [None, None])


@dataclass
class _Batch:
    """What several layers send each other for the next step, in one message to each patch."""

    trades: list[Trade] = field(default_factory=list)
    size: int = 0
    pending: list[Pending] = field(default_factory=list)

    def add(self, sends: Parcels, receives: Parcels) -> None:
        """Takes in what one layer sends and gets."""
        self.trades.append((sends, receives))
        self.size += sum(tensor.nbytes for parcel in sends for tensor in parcel.values())

    def wait(self) -> None:
        """Waits until all of it has come in, once; on a GPU only the stream does."""
        for message in self.pending:
            message.wait()
        self.pending = []


class Traffic:
    """Messages of one denoiser call's layers, and what stays of them for the next step.

    Each layer has two buffers: one that a step reads, and one that is written meanwhile. They change places between
    steps, and stay where they are in memory as long as the shapes do, so that a step can be recorded.

    Args:
        swap: Gets messages to the other patches.
        is_double: Whether steps write while they read; otherwise what is kept stays as it is, and one buffer does.
    """

    def __init__(self, swap: Swap, is_double: bool = True) -> None:
        self._swap = swap
        self._is_double = is_double
        self._layers: dict[str, _Layer] = {}
        self._pending: dict[str, _Batch] = {}
        self._batch = _Batch()
        self._sent: list[_Batch] = []
        self._rooms: dict[Hashable, torch.Tensor] = {}
        self.parity = 0
        """Which of the two buffers this step reads."""
        self.held: Hashable = object()
        """Tells these buffers from others."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers."""
        parcels = [parcel for layer in self._layers.values() for each in layer.others if each for parcel in each]
        return sum(tensor.nbytes for parcel in parcels for tensor in parcel.values())

    def now(self, sends: Parcels, receives: Parcels, what: str) -> Parcels:
        """What the other patches have in this step.

        Args:
            sends: For each own patch what each of some others gets, contiguous.
            receives: For each own patch buffers for what each of some others sends.
            what: What travels, for reports.
        """
        self.now_together([(sends, receives)], what)
        return receives

    def now_together(self, parcels: Sequence[Trade], what: str) -> None:
        """Several such exchanges in one, which costs little more than one of them.

        Args:
            parcels: What is sent, and buffers for what comes in, as for `now`.
            what: What travels, for reports.
        """
        for message in self.begin(parcels, what):
            message.wait()

    def begin(self, parcels: Sequence[Trade], what: str) -> list[Pending]:
        """Begins such exchanges, beside which something may be computed until all of what it returns was waited for.

        Args:
            parcels: As for `now_together`; what is sent stays as it is until then.
            what: What travels, for reports.
        """
        return self._swap.post(parcels, what, is_waited_for=True)

    def room(self, key: Hashable, like: torch.Tensor, rows: int) -> torch.Tensor:
        """Memory for what travels in one layer after the other, until `now` returns.

        NCCL's process groups mark what point-to-point messages are sent from and come into, and a recording uses such
        memory for nothing else afterwards (github.com/pytorch/pytorch/issues/132292): that of each layer would add up.

        Args:
            key: What tells parts of one message from one another.
            like: Rows [B, rows, ...] such as are to travel.
            rows: How many of them.
        """
        shape = like.shape[0], rows, *like.shape[2:]
        key = key, shape, like.dtype, like.device
        if key not in self._rooms:
            self._rooms[key] = _empty(shape, like)
            self.held = object()
        return self._rooms[key]

    def zeros(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Zeros that nobody writes into: what is outside of the picture.

        Args:
            shape: Their shape.
            like: A tensor of their type and device.
        """
        key = "zeros", shape, like.dtype, like.device
        if key not in self._rooms:
            self._rooms[key] = _empty(shape, like).zero_()
            self.held = object()
        return self._rooms[key]

    def keep(self, name: str, received: Parcels, own: Sequence[torch.Tensor] = ()) -> None:
        """Keeps for the next step what came in now.

        Args:
            name: Name of the layer.
            received: What came in.
            own: What the own patches had.
        """
        for buffers, parcel in zip(self._next(name, received), received, strict=True):
            for source, tensor in parcel.items():
                buffers[source].copy_(tensor)
        self._keep_own(name, own)

    def before(self, name: str) -> Parcels:
        """What the other patches had in the step before, as far as it was kept or sent."""
        if name in self._pending:
            self._pending.pop(name).wait()
        found = self._layers[name].others[self.parity]
        assert found is not None
        return found

    def own_before(self, name: str) -> list[torch.Tensor]:
        """What the own patches had in the step before."""
        found = self._layers[name].own[self.parity]
        assert found is not None
        return found

    def later(self, name: str, sends: Parcels, own: Sequence[torch.Tensor] = (), stays: bool = True) -> None:
        """Sends what the other patches read in the next step, beside the computation; `before` comes before it.

        Args:
            name: Name of the layer.
            sends: As for `now`; what comes in is like what came in the step before.
            own: What the own patches have.
            stays: Whether what is sent stays as it is until the step ends; otherwise a copy of it is sent.
        """
        like = self._layers[name].others[self.parity]
        assert like is not None
        if not stays:
            sends = cloned(sends)
        self._batch.add(sends, self._next(name, like))
        self._pending[name] = self._batch
        self._keep_own(name, own)
        if self._batch.size > BATCH_BYTES:
            self.post()

    def post(self) -> None:
        """Posts what has come together for the next step."""
        batch, self._batch = self._batch, _Batch()
        if batch.trades:
            batch.pending = self._swap.post(batch.trades, "rows and moments for the next step", is_waited_for=False)
            # until they have left
            self._sent.append(batch)

    def turn_over(self) -> None:
        """Begins the next step: what was kept, or is coming in, is what it reads; `post` comes before it."""
        assert not self._batch.trades, "what the next step reads was not posted"
        # what was sent in the step before has left by now
        self._sent = [batch for batch in self._sent if batch.pending]
        self.parity ^= 1

    def join(self) -> None:
        """Waits for all that is under way; on a GPU only the stream does. What was not posted is let go."""
        for batch in self._sent:
            batch.wait()
        self.abandon()

    def abandon(self) -> None:
        """Forgets the messages of a recording that came to nothing."""
        self._pending.clear()
        self._sent.clear()
        self._batch = _Batch()

    def restart(self) -> None:
        """Begins a sample: with the same one of the buffers each time."""
        self.join()
        self.parity = 0

    def drop(self) -> None:
        """Waits for what is under way, and gives the buffers back."""
        self.join()
        self._layers.clear()
        self._rooms.clear()
        self.held = object()

    def _next(self, name: str, like: Parcels) -> Parcels:
        """The buffers that are written in this step."""
        layer = self._layers.setdefault(name, _Layer())
        if layer.others[1 - self.parity] is None:
            for place in self._places():
                layer.others[place] = [{source: _like(tensor) for source, tensor in each.items()} for each in like]
        found = layer.others[1 - self.parity]
        assert found is not None
        return found

    def _keep_own(self, name: str, own: Sequence[torch.Tensor]) -> None:
        layer = self._layers[name]
        if layer.own[1 - self.parity] is None:
            for place in self._places():
                layer.own[place] = [_like(tensor) for tensor in own]
        found = layer.own[1 - self.parity]
        assert found is not None
        for buffer, tensor in zip(found, own, strict=True):
            buffer.copy_(tensor)

    def _places(self) -> tuple[int, ...]:
        """Which of the two buffers are wanted: both at once, since recordings know them by their place."""
        self.held = object()
        return (0, 1) if self._is_double else (1 - self.parity,)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return _empty(tensor.shape, tensor)


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    with lasting():
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def cloned(parcels: Sequence[dict[int, torch.Tensor]]) -> Parcels:
    """Copies of parcels: what they are cut from may change before they have left. One for several is copied once."""
    tensors = {id(tensor): tensor for parcel in parcels for tensor in parcel.values()}
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return [{patch: copies[id(tensor)] for patch, tensor in parcel.items()} for parcel in parcels]


def together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of the own patches as one; a single one stays where it is."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
