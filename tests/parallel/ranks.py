"""Runs a function on several gloo ranks of this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# each process would import these anew, for seconds
PRELOADED = ["torch.distributed", "asyncdiff_pl.parallel", "pytest", "numpy"]
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
    """Calls `function(rank, *args)` on each of `world_size` processes; an error in one is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_main, (world_size, port, function, args), world_size, start_method="forkserver")


def _main(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        with torch.no_grad():
            function(rank, *args)
    finally:
        dist.destroy_process_group()
