"""Tells of a message that never came, where waiting for it stops only the GPU.

On NCCL nobody on the CPU waits for a message: a hang would show as a GPU that is busy for ever. A thread looks at the
messages that are under way and, when one is older than the timeout, says which and ends the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, Protocol


class Work(Protocol):
    """What a message must tell of itself."""

    def is_completed(self) -> bool:
        """Whether it has come through."""


def end_process(message: str) -> NoReturn:
    """Says `message` and ends the process without waiting for anything."""
    print(f"asyncdiff_pl: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Watch:
    """Watches messages until they have come through.

    Args:
        timeout: Age at which a message counts as lost.
        on_lost: Called with a description of the first lost message.
        interval: Seconds between two looks.
    """

    def __init__(self, timeout: timedelta, on_lost: Callable[[str], None] = end_process, interval: float = 2.0) -> None:
        self.timeout = timeout
        self._on_lost = on_lost
        self._interval = interval
        self._messages: deque[tuple[float, Work, str]] = deque()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, work: Work, description: str) -> None:
        """Watches one more message."""
        while self._messages and self._messages[0][1].is_completed():
            self._messages.popleft()
        self._messages.append((time.monotonic(), work, description))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="message-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            for posted, work, description in list(self._messages):
                age = time.monotonic() - posted
                if age > self.timeout.total_seconds() and not work.is_completed():
                    self._on_lost(f"{description} has not come through in {age:.0f} s")
                    return
