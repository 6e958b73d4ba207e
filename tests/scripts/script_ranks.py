"""Runs a benchmark on two gloo ranks of this machine, as torchrun would."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from ranks import free_port, start_processes


def run_on_two(code: str, options: str, folder: Path) -> list[str]:
    """What each rank says that runs `code` with a command's options in a folder."""
    start_processes(2, _run, free_port(), code, options.split(), folder)
    return [(folder / f"said{rank}.txt").read_text() for rank in range(2)]


def _run(rank: int, port: int, code: str, options: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv = ["-c", *options, "--device", "cpu", "--seconds", "140"]
    os.chdir(folder)
    with (folder / f"said{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        exec(code, {"__name__": "__main__"})
