"""Runs a function on several gloo ranks of this machine."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., None], *args) -> None:
    """Calls `function(rank, *args)` on each of `world_size` processes; an error in one is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_main, (world_size, port, function, args), nprocs=world_size)


def _main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        with torch.no_grad():
            function(rank, *args)
    finally:
        dist.destroy_process_group()
