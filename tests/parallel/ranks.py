"""Runs a function on several gloo ranks of this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# each process would import these anew, for seconds
PRELOADED = ["torch.distributed", "asyncdiff_pl.models", "asyncdiff_pl.parallel", "pytest", "numpy"]
PRELOADED += [f"diffusers.models.unets.{name}" for name in ("unet_motion_model", "unet_spatio_temporal_condition")]
PRELOADED += [f"diffusers.schedulers.scheduling_{name}" for name in ("ddim", "ddpm")]
PRELOADED += [
    f"diffusers.pipelines.{name}"
    for name in (
        "animatediff.pipeline_animatediff",
        "controlnet.pipeline_controlnet",
        "controlnet.pipeline_controlnet_sd_xl",
        "dit.pipeline_dit",
        "flux.pipeline_flux",
        "stable_diffusion.pipeline_stable_diffusion_img2img",
        "stable_diffusion.pipeline_stable_diffusion_upscale",
        "stable_diffusion_3.pipeline_stable_diffusion_3",
        "stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
    )
]


def run_ranks(world_size: int, function: Callable[..., None], *args) -> None:
    """Calls `function(rank, *args)` on each of `world_size` connected processes; an error in one is raised here."""
    start_processes(world_size, _main, world_size, free_port(), function, args)


def start_processes(number: int, function: Callable[..., None], *args) -> None:
    """Calls `function(rank, *args)` in some processes; an error in one is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args, number, start_method="forkserver")


def free_port() -> int:
    """A port for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Scenario = Callable[..., list[torch.Tensor]]
"""Gives latents, the same for ranks (`simulate=False`) and for one process that plays them."""


def run_four_ranks(
    scenarios: Sequence[Scenario], group: Scenario, checks: Sequence[Callable[[int], None]]
) -> dict[str, Any]:
    """Plays scenarios on four ranks, which compare to the bit with this process.

    Args:
        scenarios: Of all four.
        group: Of two data groups of two ranks, of which it is given the number first.
        checks: What is no comparison; they are given the rank.

    Returns:
        What this process made, by the scenarios' names.
    """
    expected: dict[str, Any] = {scenario.__name__: scenario(simulate=True) for scenario in scenarios}
    groups = [group(number, simulate=True) for number in range(2)]
    run_ranks(4, _play_in_four, scenarios, expected, group, groups, checks)
    return expected


def _play_in_four(rank, scenarios, expected, group, groups, checks) -> None:
    for scenario in scenarios:
        same(scenario.__name__, scenario(simulate=False), expected[scenario.__name__])
    same("two data groups", group(rank // 2, simulate=False), groups[rank // 2])
    for check in checks:
        check(rank)


def same(name: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compares what a rank made to the bit."""
    assert len(found) == len(expected), name
    for at, pair in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(*pair), f"{name}, sample {at}: rank {dist.get_rank()} differs from the simulation"


def _main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        with torch.no_grad():
            function(rank, *args)
    finally:
        dist.destroy_process_group()
