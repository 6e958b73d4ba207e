"""The denoiser calls of a step, each with what belongs to it: stale values, messages and recordings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncdiff_pl.parallel.stages.call import Stream


class Streams:
    """Streams by the number of a denoiser call in its step, and by the kind of its inputs.

    One kind is in use at a time. With recordings another one is kept beside it, since some take turns (guidance that
    ends in mid-sample, two resolutions), and a recording is made anew when its buffers are others.
    """

    def __init__(self) -> None:
        self._current: dict[int, Stream] = {}
        self._set_aside: dict[int, Stream] = {}

    def __iter__(self) -> Iterator[Stream]:
        yield from (*self._current.values(), *self._set_aside.values())

    def of(self, call: int) -> Stream:
        """The stream of a call number, for the inputs that it had last."""
        return self._current.setdefault(call, Stream())

    def turn_to(self, call: int, signature: Any, keeps: bool) -> Stream:
        """The stream of a call number for another kind of inputs.

        Args:
            call: Number of the call in its step.
            signature: Tells a kind of inputs from others.
            keeps: Whether the kind that was in use is kept.
        """
        before, other = self.of(call), self._set_aside.pop(call, None)
        if other is not None and (other.signature != signature or not keeps):
            other.drop()
            other = None
        if before.phases is None or not keeps:
            before.drop()
        else:
            before.join()
            self._set_aside[call] = before
        self._current[call] = other or Stream()
        return self._current[call]

    def begin_sample(self) -> None:
        """Has all stale values taken for another sample's."""
        for stream in self:
            stream.next_position = None
            if stream.phases is not None:
                stream.phases.begin_sample()

    def join(self) -> None:
        """Waits for all messages that are under way."""
        for stream in self:
            stream.join()

    def drop(self) -> None:
        """Forgets all streams."""
        for stream in self:
            stream.drop()
        self._current.clear()
        self._set_aside.clear()
