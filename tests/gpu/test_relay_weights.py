"""Relay on GPUs: what a rank's GPU holds, and what ranks compute over NCCL."""

import gc
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from denoisers import Sampler, build, ddim
from test_relay import held, owned, program

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.stages.placement import Placement
from asyncdiff_pl.parallel.stages.units import split_modules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BLOCK = 512
"""Bytes that an allocation takes at least, and a multiple of which it takes."""


def test_weights_of_other_stages_never_get_there():
    denoiser, fresh = build("sd21"), build("sd21")
    # what other tests left would be freed in between
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    placement = Placement(denoiser, split_modules(denoiser)[1], torch.device("cuda", 0))
    # pipelines ask the denoiser where they are to compute
    assert denoiser.device == torch.device("cuda", 0)
    placement.place(program(3), 1)
    weights = dict(denoiser.named_parameters())
    assert {weight.device.type for weight in weights.values()} == {"cuda"}
    assert owned(denoiser, 1) < held(denoiser)
    own = sum(-(-weights[name].nbytes // BLOCK) * BLOCK for name in held(denoiser))
    buffers = sum(-(-buffer.nbytes // BLOCK) * BLOCK for buffer in denoiser.buffers())
    # beside those a placeholder for each
    assert torch.cuda.max_memory_allocated() - before <= own + buffers + len(weights) * BLOCK
    placement.remove()
    assert torch.cuda.memory_allocated() == before
    for one, two in zip(fresh.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(one, two)


def sample(device, **settings):
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21", size=16)
    sampler.latents = sampler.latents.to(device)
    sampler.kwargs = {name: value.to(device) for name, value in sampler.kwargs.items()}
    if "warm_up_mode" not in settings:
        denoiser.to(device)
    handle = parallelize(denoiser, scheduler=scheduler, stages=2, warm_up=2, **settings)
    latents = [sampler(denoiser, scheduler, 6) for _ in range(3)]
    handle.remove()
    return latents


def play(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    with torch.no_grad():
        expected = sample("cuda", simulate=True, capture=False)
        for capture in (False, True):
            for found, wanted in zip(sample("cuda", warm_up_mode="relay", capture=capture), expected, strict=True):
                assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_relay_over_nccl_is_one_gpus_warm_up():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(play, (port,), 2)
