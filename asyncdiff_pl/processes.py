"""How the processes of a run end: together, quickly, and with one sentence where the input was bad.

Every rank finds a fault in the input that all share, and a rank whose neighbour is gone fails as well. Only the rank
that failed first speaks: the launcher settles which one that is (strategies/launcher.py), and before the ranks are
connected it is rank 0.
"""

from __future__ import annotations

import ctypes
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import NoReturn

PATIENCE = 20.0
"""Seconds that a rank leaves the first one of its node to say what is wrong, while the ranks are not connected."""

NODE_PATIENCE = 5.0
"""Seconds that the first rank of a node leaves rank 0 on another one to do so."""

GRACE = 10.0
"""Seconds that a process has for ending by itself."""

FIRST_TO_FAIL = "This was the first rank to fail; the others were ended."
"""Note on an error that its rank need not wait with: no other rank speaks."""

TRAINING_GRACE = 150.0
"""The same for a training run that has a step, perhaps a validation, to finish and its state to save."""

BAD_INPUT = 2
"""Exit status after bad input."""

WORDED = ("asyncdiff_pl", "lightning")
"""Packages whose `ValueError`s are written for users; one that comes from elsewhere is shown with its traceback."""


class RankFailedError(Exception):
    """Another rank failed before this one, and says why.

    Args:
        message: What happened, if nobody else says it.
        status: Exit status of the rank that failed.
    """

    def __init__(self, message: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Terminated(KeyboardInterrupt):
    """SIGTERM: the run is to stop as with Ctrl-C."""


def own_rank() -> int:
    """Number of this process among the ranks, as far as it is known from the environment alone."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))))


def is_started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """Has this process killed when the one that started it dies, if it is one of several ranks (Linux only).

    A killed launcher would otherwise leave ranks behind that hold their GPUs.
    """
    # under torchrun every rank has a parent that started it, under Lightning's own launcher all but the first
    is_child = is_started_by_torchrun() or int(os.environ.get("LOCAL_RANK", "0")) > 0
    if not is_child or not sys.platform.startswith("linux"):
        return
    set_death_signal, init = 1, 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() == init:
        # the parent died before it was asked for
        os._exit(1)


def heed_signals(grace: float | None = None) -> None:
    """Has Ctrl-C and SIGTERM end all ranks: rank 0 ends in order, the others at once and without a word.

    Args:
        grace: Seconds that rank 0 has for that; `GRACE` if None. A second signal leaves it `GRACE` at most.
    """
    if own_rank() == 0:
        signal.signal(signal.SIGTERM, _terminate)
        _end_even_when_stuck(GRACE if grace is None else grace)
    elif is_started_by_torchrun():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        # a terminal sends Ctrl-C to all of its processes; rank 0 ends the others after it has stopped itself
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def report_and_exit(error: BaseException) -> NoReturn:
    """Ends this process after saying why, if it is this one that has to.

    Bad input ends with its sentence and status 2, anything else with its traceback and status 1, and an interrupted run
    as shells have it (130 after Ctrl-C). Set `ASYNCDIFF_PL_TRACEBACK=1` to see where a sentence comes from.
    """
    if own_rank() == 0:
        # torchrun sends SIGTERM as soon as another rank has ended: this one is about to end anyway
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(error, SystemExit):
        # Lightning leaves an interrupted run this way, after it has told the callbacks
        cause = error.__context__
        if isinstance(cause, KeyboardInterrupt):
            _exit(_interrupted_status(cause))
        _exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    if isinstance(error, BrokenPipeError):
        # whoever read the output, `head` say, has read enough
        _exit(0)
    if isinstance(error, KeyboardInterrupt):
        if own_rank() == 0:
            _say("stopped")
        _exit(_interrupted_status(error))
    status = exit_status(error)
    is_input = status == BAD_INPUT
    if is_input and own_rank() > 0 and FIRST_TO_FAIL not in getattr(error, "__notes__", ()):
        time.sleep(NODE_PATIENCE if os.environ.get("LOCAL_RANK") == "0" else PATIENCE)
    sentence = None
    if isinstance(error, RankFailedError):
        sentence, status = str(error), error.status
    elif is_input:
        sentence = " ".join(str(error).split())
    elif _is_named(error, "OutOfMemoryError"):
        sentence = f"rank {own_rank()} has no GPU memory left; take smaller pictures, fewer frames or a smaller batch."
    if sentence is None or os.environ.get("ASYNCDIFF_PL_TRACEBACK") == "1":
        traceback.print_exception(error)
    if sentence:
        _say(f"error: {sentence}")
    _exit(status)


def exit_status(error: BaseException) -> int:
    """Exit status of a process that ends with this error: 2 for bad input, 1 for anything else."""
    is_worded = isinstance(error, ValueError) and _origin(error) in WORDED
    return BAD_INPUT if is_worded or _is_named(error, "MisconfigurationException") else 1


def _is_named(error: BaseException, name: str) -> bool:
    # by name: their packages take seconds to import, and may not be by now
    return name in (kind.__name__ for kind in type(error).__mro__)


def _origin(error: BaseException) -> str:
    """The package whose code raised an error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _interrupted_status(error: KeyboardInterrupt) -> int:
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _say(text: str) -> None:
    print(f"asyncdiff_pl: {text}", file=sys.stderr, flush=True)


def _exit(status: int) -> NoReturn:
    # data workers and their locks: the interpreter's own end, which sees to them, is left out below
    multiprocessing.util._exit_function()
    # a rank that waits for this one in a collective must not keep the interpreter from ending
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _end_even_when_stuck(grace: float) -> None:
    """Ends this process some seconds after Ctrl-C or SIGTERM, even if it hangs in a message or on the GPU.

    Python itself handles a signal only when the call in work returns.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)

    def wait() -> None:
        number = _next_stop(reader)
        reader.settimeout(grace)
        try:
            number = _next_stop(reader)
            time.sleep(min(grace, GRACE))
        except TimeoutError:
            pass
        os._exit(128 + number)

    threading.Thread(target=wait, name="signal-watch", daemon=True).start()


def _next_stop(reader: socket.socket) -> int:
    """Waits for Ctrl-C or SIGTERM among the numbers of all signals; a TimeoutError where the socket has a timeout."""
    number = 0
    while number not in (signal.SIGINT, signal.SIGTERM):
        number = reader.recv(1)[0]
    return number
