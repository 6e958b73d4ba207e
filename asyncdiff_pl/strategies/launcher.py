"""Starts the ranks of this machine, and sees to it that all of them end when one does.

Lightning's own launcher kills the main process with SIGKILL some seconds after another rank has ended, whether or not
that rank's reason has been told; and each rank that fails because another one did reports a broken connection.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

from asyncdiff_pl.processes import FIRST_TO_FAIL, GRACE, RankFailedError, exit_status

INTERVAL = 0.2
"""Seconds between two looks at the other ranks' processes."""

MOMENT = 0.5
"""Seconds in which a rank that was killed shows as such."""


class GroupLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine as processes, unless torchrun or a cluster has done so."""

    _is_killing = False

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Runs `function` on all ranks.

        Raises:
            RankFailedError: In place of this rank's own error, where another rank failed before.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._end_with_children, name="rank-watch", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            casualty = self._casualty()
            if casualty:
                raise RankFailedError(casualty) from error
            if _distributed_is_initialized():
                first, status = first_to_fail(exit_status(error))
                if first != dist.get_rank():
                    raise RankFailedError(status=status) from error
                error.add_note(FIRST_TO_FAIL)
            raise

    @override
    def kill(self, signum: Any) -> None:
        self._is_killing = True
        super().kill(signum)

    def _end_with_children(self) -> None:
        """Ends this process after another rank has failed, unless it ends by itself."""
        failed: list[int] = []
        while not failed:
            time.sleep(INTERVAL)
            failed = [process.returncode for process in self.procs if process.poll()]
        time.sleep(GRACE)
        if self._is_killing:
            return
        casualty = self._casualty()
        if casualty:
            print(f"asyncdiff_pl: error: {casualty}", file=sys.stderr, flush=True)
        os._exit(max(1, failed[0]))

    def _casualty(self) -> str | None:
        """Says which rank's process was killed, if one was: it could not say so itself."""
        end = time.monotonic() + MOMENT
        while not self._is_killing and self.procs and time.monotonic() < end:
            for rank, process in enumerate(self.procs, start=1):
                status = process.poll()
                if status is not None and status < 0:
                    name = signal.Signals(-status).name
                    return f"The process of rank {rank} was killed ({name}), as the system does when memory runs out."
            # a connection may break before its process has ended
            time.sleep(MOMENT / 20)
        return None


def first_to_fail(status: int) -> tuple[int, int]:
    """The rank that was the first of all connected ones to ask this, and the exit status that it gave.

    Args:
        status: Exit status that this rank would end with.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = f"{dist.get_rank()} {status}"
    try:
        store = dist.distributed_c10d._get_default_store()
        rank, status_there = store.compare_set(f"asyncdiff_pl/failed/{attempt}", "", own).decode().split()
    except (RuntimeError, ConnectionError):
        # the store lies with rank 0; where that is gone, it has failed before
        return 0, status
    return int(rank), int(status_there)
