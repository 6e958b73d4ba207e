"""Exact steps that go from stage to stage, so that a rank needs no weights but its own stage's (warm_up_mode relay).

Each rank runs through the denoiser as in an asynchronous step, but waits at each of another stage's values for that of
this very step. So the stages take turns, as often as the cut changes sides along the denoiser, and the step takes as
long as on one rank. Its values lie afterwards where the first asynchronous step reads those of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncdiff_pl.parallel.exchange import Message, Pending
from asyncdiff_pl.parallel.stages.units import Value
from asyncdiff_pl.parallel.stages.worker import Worker


class RelayWorker:
    """A rank's buffers in an exact step: what comes in is read in the step in which it was made.

    Args:
        worker: The rank's buffers.
        is_last: Whether an asynchronous step may follow, which reads the buffers once more.
    """

    def __init__(self, worker: Worker, is_last: bool) -> None:
        self.rank = worker.rank
        self.stage = worker.stage
        self.consumed = worker.consumed
        self._worker = worker
        self._is_last = is_last
        self._expected: dict[int, Pending] = {}

    def read(self, value: int) -> torch.Tensor:
        """Another stage's value of this step; waits until it is here."""
        pending = self._expected.pop(value, None)
        if pending is not None:
            pending.wait()
        tensor = self._worker.current(value)
        # what follows may write into it (FreeU scales its input in place)
        return tensor.clone() if self._is_last else tensor

    def incoming(self, value: int) -> torch.Tensor:
        """The buffer that a value is received into."""
        return self._worker.current(value)

    def expect(self, value: int, pending: Pending) -> None:
        """Notes what must be waited for before that buffer is read."""
        self._expected[value] = pending

    def finish(self) -> None:
        """Ends the step: waits for what nobody has read."""
        for pending in self._expected.values():
            pending.wait()
        self._expected.clear()


def relay_order(messages: Sequence[Message]) -> list[Message]:
    """The messages of an exact step in the order in which one denoiser call makes them.

    All that a value is made from comes before it. So a rank that posts its messages in this order never waits for one
    that is not posted.
    """
    return sorted(messages, key=lambda message: message.value)


def check_formats(device: torch.device) -> None:
    """Checks that boundary tensors have the number formats that were traced.

    Args:
        device: Where the denoiser computes.

    Raises:
        ValueError: Autocast changes them.
    """
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "warm_up_mode relay receives boundary tensors in the number formats of the weights, and autocast changes "
            "them: load the weights in the format that is wanted, or take warm_up_mode replicated."
        )


def traced_likes(values: Sequence[Value]) -> dict[int, torch.Tensor]:
    """For each value a tensor on the meta device like it, as traced: no rank makes all of them."""
    return {
        value.index: torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
        for value in values
    }
