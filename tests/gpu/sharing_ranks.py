"""What ranks share beside the denoiser, against each rank alone: bits, seconds and memory; run by hand.

    torchrun --nproc_per_node 2 tests/gpu/sharing_ranks.py                                      # tiny-sd, as it ships
    torchrun --nproc_per_node 2 tests/gpu/sharing_ranks.py \
        --model stabilityai/stable-diffusion-xl-base-1.0 --size 1024                            # random weights

Prints a table of checks; exit status 1 if one of them fails. Without a GPU it runs on the CPU over gloo.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.models import PipelinePredictor
from asyncdiff_pl.parallel import parallelize

PROMPTS = ["a red ball on a lawn", "two dogs", "a house by the sea", "night"]


def timed(work: Callable[[], Any]) -> tuple[list[torch.Tensor], float]:
    """The tensors that come out, and the seconds of the last of three runs, in which nobody waits for a late rank."""
    for _ in range(3):
        dist.barrier()
        started = time.perf_counter()
        found = [leaf for leaf in tree_leaves(work()) if isinstance(leaf, torch.Tensor)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return found, seconds


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """To the bit; random weights may overflow in float16, in both alike."""
    return len(first) == len(second) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(first, second, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures, in pixels")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    module = PipelinePredictor(
        options.model,
        weights="pretrained" if options.model == "tiny-sd" else "random",
        dtype="float16" if on_gpu else "float32",
    )
    module.configure_model()
    pipe, rank, world = module.pipeline.to(device), dist.get_rank(), dist.get_world_size()
    size = options.size // pipe.vae_scale_factor
    latents = torch.randn(len(PROMPTS), 4, size, size, generator=torch.Generator().manual_seed(0))
    latents = latents.to(device, pipe.vae.dtype)
    works = {
        "encoding": lambda: pipe.encode_prompt(
            PROMPTS, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        ),
        "decoding": lambda: pipe.vae.decode(latents, return_dict=False),
    }

    def allocated() -> float:
        return torch.cuda.memory_allocated(device) / 2**30 if on_gpu else float("nan")

    with torch.inference_mode():
        pipe.vae.enable_slicing()
        alone = {name: timed(work) for name, work in works.items()}
        pipe.vae.disable_slicing()
        before = allocated()
        handle = parallelize(pipe, stages=world, share_decoding=True, share_encoding=True)
        during = allocated()
        shared = {name: timed(work) for name, work in works.items()}
        handle.remove()
        after = {name: timed(work) for name, work in works.items() if name == "encoding"}
    checks = {name: are_equal(alone[name][0], shared[name][0]) for name in works}
    checks["encoding after removal"] = are_equal(alone["encoding"][0], after["encoding"][0])
    lines = [f"rank {rank}: weights and results {before:.3f} GiB before, {during:.3f} GiB shared"]
    lines += [f"rank {rank}: {name}: {alone[name][1]:.4f} s alone, {shared[name][1]:.4f} s shared" for name in works]
    lines += [f"rank {rank}: {name}: {'equal' if passes else 'DIFFERS'}" for name, passes in checks.items()]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (lines, all(checks.values())))
    if rank == 0:
        print("\n".join(line for lines, _ in gathered for line in lines), flush=True)
    dist.destroy_process_group()
    return 0 if all(passes for _, passes in gathered) else 1


if __name__ == "__main__":
    sys.exit(main())
