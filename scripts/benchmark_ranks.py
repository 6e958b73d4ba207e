"""One rank of scripts/benchmark.py: runs the package's command several times in one process, under torchrun."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark import FAILED, FINISHED

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.terminal import tidy
from asyncdiff_pl.processes import die_with_parent


def main(plan: Path) -> None:
    """Runs what a plan says.

    Args:
        plan: JSON with the `accelerator` and with each of the `runs`: its `arguments` and its log
            `folder`.
    """
    die_with_parent()
    tidy()
    settings = json.loads(plan.read_text(encoding="utf-8"))
    is_gpu, rank = settings["accelerator"] == "gpu", int(os.environ["LOCAL_RANK"])
    if int(os.environ["WORLD_SIZE"]) > 1:
        # a connection that the first run made would end with it, and torch makes no second one at the same address
        device = torch.device("cuda", rank) if is_gpu else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device)
    for entry in settings["runs"]:
        folder = Path(entry["folder"])
        try:
            run(entry["arguments"])
        except BaseException as error:
            _tell(folder.with_name(f"{folder.name}{FAILED}"), error)
            raise
        gc.collect()
        if is_gpu:
            # what the next run reserves is measured from here
            torch.cuda.empty_cache()
        if rank == 0:
            (folder / FINISHED).touch()
    if dist.is_initialized():
        dist.destroy_process_group()


def _tell(path: Path, error: BaseException) -> None:
    """Writes why a run failed, unless another rank has: that one was the first."""
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception_only(error)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
