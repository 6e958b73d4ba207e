"""How data workers start and end: processes that make batches beside the one that computes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

from torch.utils.data import Dataset


def worker_settings(dataset: Dataset[Any], num_workers: int) -> dict[str, Any]:
    """Arguments of a `DataLoader` that say how its workers run.

    Args:
        dataset: What the workers read; it must be picklable if there are any.
        num_workers: Number of processes; 0 reads in the process that asks.
    """
    if not num_workers:
        return {"num_workers": 0}
    # a forked child would inherit the locks of communication threads in whatever state they are
    context = multiprocessing.get_context("forkserver")
    # imported once, by the process that workers are forked from
    context.set_forkserver_preload(["__main__", type(dataset).__module__])
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _begin}


def _begin(worker: int) -> None:
    # a terminal sends Ctrl-C to all of its processes; the main one needs its batches until it has stopped in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a worker is one of many, and has one thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _end_with_main_process()


def _end_with_main_process() -> None:
    """Ends this data worker as soon as the main process is gone, however that ended.

    PyTorch's workers watch the process that forked them. That is the fork server, and it ends only after its workers.
    """
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def wait() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
