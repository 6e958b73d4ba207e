"""How tensors get from patch to patch: each patch a rank, or all of them played by one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from asyncdiff_pl.parallel.exchange import Exchange, Pending

Parcels = list[dict[int, torch.Tensor]]
"""For each patch that this process plays: a tensor for, or from, each of some other patches."""

Trade = tuple[Parcels, Parcels]
"""What each of the patches that this process plays sends, and its buffers for what it gets."""


class Swap(Protocol):
    """Gets parcels from patch to patch."""

    sent_bytes: int

    def post(self, parcels: Sequence[Trade], what: str, is_waited_for: bool) -> list[Pending]:
        """Has each buffer hold what the other patch sends, as soon as what this returns was waited for.

        Args:
            parcels: What is sent, and buffers for what comes in.
            what: What travels, for reports.
            is_waited_for: Whether the computation waits for it, rather than go on beside it.
        """


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

    def post(self, parcels: Sequence[Trade], what: str, is_waited_for: bool) -> list[Pending]:
        """Posts the messages of this rank's patch."""
        return self._exchange.swap_together(
            [(sends[0], receives[0]) for sends, receives in parcels], what, is_waited_for
        )


class LocalSwap:
    """One process plays all patches."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        """Bytes that all patches have sent."""

    def post(self, parcels: Sequence[Trade], what: str, is_waited_for: bool) -> list[Pending]:
        """Copies what the patches have for one another."""
        for sends, receives in parcels:
            for patch, buffers in enumerate(receives):
                for source, buffer in buffers.items():
                    buffer.copy_(sends[source][patch])
                    self.sent_bytes += buffer.nbytes
        return []
