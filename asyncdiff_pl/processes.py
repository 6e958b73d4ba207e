"""How the processes of a run end: together, and with one sentence where the input was bad."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback

PATIENCE = 20.0
"""Seconds that a rank above 0 leaves rank 0 to say what is wrong with the input of all."""


def die_with_parent() -> None:
    """Has this process killed when the one that started it dies, if it is one of several ranks (Linux only).

    A killed launcher would otherwise leave ranks behind that hold their GPUs.
    """
    if not _is_started_by_a_launcher() or not sys.platform.startswith("linux"):
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def report_and_exit(error: Exception) -> None:
    """Ends this process: bad input with its sentence and status 2, anything else with its traceback and status 1.

    Set `ASYNCDIFF_PL_TRACEBACK=1` to see where a sentence comes from.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    is_input = isinstance(error, ValueError | MisconfigurationException)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    if is_input and rank > 0:
        # all ranks find the same fault: rank 0 says it, and takes the others with it
        sys.stdout.flush()
        time.sleep(PATIENCE)
    if not is_input or os.environ.get("ASYNCDIFF_PL_TRACEBACK") == "1":
        traceback.print_exception(error)
    if is_input:
        sentence = " ".join(str(error).split())
        print(f"asyncdiff_pl: error: {sentence}", file=sys.stderr, flush=True)
    # a rank that waits for this one in a collective must not keep the interpreter from ending
    sys.stdout.flush()
    os._exit(2 if is_input else 1)


def _is_started_by_a_launcher() -> bool:
    # under torchrun every rank has a parent that started it, under Lightning's own launcher all but the first
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("LOCAL_RANK", "0")) > 0
