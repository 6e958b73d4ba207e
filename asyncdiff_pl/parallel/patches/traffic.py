"""What patches tell each other, layer by layer: at once, or for the next step while this one goes on.

All ranks run through the same layers in the same order, and each of them posts its messages of a layer when it comes
to it: that is the order which they keep to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from asyncdiff_pl.parallel.exchange import Exchange, Pending

Parcels = list[dict[int, torch.Tensor]]
"""For each patch that this process plays: a tensor for, or from, each of some other patches."""


class Swap(Protocol):
    """Gets parcels from patch to patch."""

    sent_bytes: int

    def post(self, sends: Parcels, receives: Parcels, what: str) -> list[Pending]:
        """Fills `receives` with what the other patches send; not before what it returns was waited for."""


class RankSwap:
    """Each patch is a rank.

    Args:
        exchange: This rank's messages.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent."""
        return self._exchange.sent_bytes

    def post(self, sends: Parcels, receives: Parcels, what: str) -> list[Pending]:
        """Posts the messages of this rank's patch."""
        return self._exchange.swap(sends[0], receives[0], what)


class LocalSwap:
    """One process plays all patches."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        """Bytes that all patches have sent."""

    def post(self, sends: Parcels, receives: Parcels, what: str) -> list[Pending]:
        """Copies what the patches have for one another."""
        for patch, buffers in enumerate(receives):
            for source, buffer in buffers.items():
                buffer.copy_(sends[source][patch])
                self.sent_bytes += buffer.nbytes
        return []


@dataclass
class _Layer:
    """What one layer has from other patches."""

    received: Parcels | None = None
    pending: list[Pending] = field(default_factory=list)
    sent: Parcels | None = None
    spare: Parcels | None = None
    own: list[torch.Tensor] = field(default_factory=list)

    def settle(self) -> None:
        """Waits for what is under way; on a GPU only the stream does."""
        for message in self.pending:
            message.wait()
        self.pending.clear()
        self.sent = None


class Traffic:
    """Messages of one denoiser call's layers, and what stays of them for the next step.

    Args:
        swap: Gets them to the other patches.
    """

    def __init__(self, swap: Swap) -> None:
        self._swap = swap
        self._layers: dict[str, _Layer] = {}
        self.sends = True
        """Whether there is a next step that will read what is sent now."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that were sent by this process, by all calls together."""
        return self._swap.sent_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that are held for the next steps."""
        parcels = [each for layer in self._layers.values() for each in (layer.received, layer.spare) if each]
        return sum(tensor.nbytes for parcel in parcels for each in parcel for tensor in each.values())

    def now(self, sends: Parcels, receives: Parcels, what: str) -> Parcels:
        """What the other patches have in this step.

        Args:
            sends: For each own patch what each of some others gets, contiguous.
            receives: For each own patch buffers for what each of some others sends.
            what: What travels, for reports.
        """
        for message in self._swap.post(sends, receives, what):
            message.wait()
        return receives

    def keep(self, name: str, received: Parcels, own: Sequence[torch.Tensor] = ()) -> None:
        """Keeps for the next step what came in now.

        Args:
            name: Name of the layer.
            received: What came in; nobody writes into it any more.
            own: What the own patches had.
        """
        self._layers[name] = _Layer(received, own=list(own))

    def before(self, name: str) -> Parcels:
        """What the other patches had in the step before, as far as it was kept or sent."""
        layer = self._layers[name]
        layer.settle()
        assert layer.received is not None
        return layer.received

    def own_before(self, name: str) -> list[torch.Tensor]:
        """What the own patches had in the step before."""
        return self._layers[name].own

    def later(self, name: str, sends: Parcels, own: Sequence[torch.Tensor] = ()) -> None:
        """Sends what the other patches read in the next step, beside the computation; `before` comes before it.

        Args:
            name: Name of the layer.
            sends: As for `now`; what comes in is like what came in the step before.
            own: What the own patches have.
        """
        if not self.sends:
            return
        layer = self._layers[name]
        assert layer.received is not None and not layer.pending
        # what this step reads stays as it is until the step is over
        into = layer.spare or [
            {source: torch.empty_like(tensor) for source, tensor in parcel.items()} for parcel in layer.received
        ]
        layer.pending = self._swap.post(sends, into, name)
        layer.sent, layer.spare, layer.received, layer.own = sends, layer.received, into, list(own)

    def drop(self) -> None:
        """Waits for what is under way, and forgets all that was kept."""
        for layer in self._layers.values():
            layer.settle()
        self._layers.clear()


def contiguous(parcels: Sequence[dict[int, torch.Tensor]]) -> Parcels:
    """Copies of parcels, each in memory of its own: what they are cut from may change."""
    return [
        {patch: tensor.clone(memory_format=torch.contiguous_format) for patch, tensor in parcel.items()}
        for parcel in parcels
    ]
