"""Ranks over NCCL with recorded steps, against eager steps and against all ranks in one process; run by hand.

    torchrun --nproc_per_node 4 tests/gpu/ranks.py                 # tiny denoisers, float32, to the bit
    torchrun --nproc_per_node 4 tests/gpu/ranks.py --full sd21     # full-size ones, float16, within 2e-3, and timed

Prints a table of checks; exit status 1 if one of them fails.
"""

import argparse
import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from denoisers import NAMES, Sampler, build, build_full, ddim, full_call, one_level

from asyncdiff_pl.parallel import WarmUp, parallelize
from asyncdiff_pl.parallel.patches.settings import MODES

COMPILED_BOUND = 1e-3
"""Relative difference of compiled and of eager code in float32."""
FULL_BOUND = 2e-3
"""Relative difference over a whole loop of recorded and eager steps in float16."""

LAYOUTS = [
    {"stages": 2, "warm_up": 2},
    {"stages": 2, "warm_up": 2, "refresh_every": 3},
    {"stages": 2, "warm_up": WarmUp(until_drift=0.35)},
    {"stages": 2, "warm_up_mode": "relay"},
    {"steps": 2, "warm_up": 2},
    # two ranks have nothing to do in the last round
    {"steps": 4, "warm_up": 1},
    {"steps": 2, "cfg": 2, "warm_up": 2},
    {"cfg": 2},
    {"stages": 2, "cfg": 2, "warm_up": 2},
    {"stages": 2, "cfg": 2, "warm_up_mode": "relay"},
    {"stages": 3, "warm_up": 1, "time_shift": True},
    {"stages": 2, "stride": 2, "warm_up": 2},
    {"stages": 4, "warm_up": 1},
    {"stages": 4, "warm_up_mode": "relay"},
]
PATCH_LAYOUTS = [
    *({"patches": 2, "mode": mode, "warm_up": 2} for mode in MODES),
    {"patches": 2, "mode": "corrected_async_gn", "portion": 0.3, "warm_up": 2},
    {"patches": 4, "mode": "full_sync"},
    {"patches": 4, "mode": "corrected_async_gn", "portion": 0.3, "warm_up": 1},
    {"patches": 2, "cfg": 2, "mode": "full_sync"},
    {"patches": 2, "cfg": 2, "mode": "stale_gn", "warm_up": 2},
]
PATCH_BOUND = 1e-9
"""Relative difference, in double precision, of patches on ranks and of one process, which computes all rows at once."""


def num_ranks(settings: dict) -> int:
    ranks_of_stages = settings.get("stages", 1) + settings.get("stride", 1) - 1
    return settings.get("cfg", 1) * max(ranks_of_stages, settings.get("patches", 1), settings.get("steps", 1))


def to_gpu(tree):
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, tree)


def sampler_of(name: str, **settings) -> Sampler:
    sampler = Sampler(name, **settings)
    sampler.latents, sampler.condition, sampler.kwargs = to_gpu((sampler.latents, sampler.condition, sampler.kwargs))
    return sampler


@contextlib.contextmanager
def installed(denoiser: nn.Module, scheduler, capture: bool = False, **settings):
    timeout = timedelta(seconds=40)
    handle = parallelize(denoiser, scheduler=scheduler, timeout=timeout, capture=capture, **settings)
    try:
        yield handle
    finally:
        handle.remove()


def play(
    name: str, settings: dict, samplers: list[Sampler], steps: int = 7, dtype: torch.dtype = torch.float32, **more
):
    """Samples with a fresh denoiser, and how many graphs were made in all and for the last one."""
    # past diffusers' own method, which warns
    denoiser, scheduler = nn.Module.to(build(name), "cuda", dtype), ddim()
    with installed(denoiser, scheduler, **settings, **more) as handle:
        found, graphs = [], [0]
        for sampler in samplers:
            found.append(sampler(denoiser, scheduler, steps).clone())
            graphs.append(handle.num_graphs)
        assert handle.capture_refusal == "", handle.capture_refusal
    return found, graphs[-1], graphs[-1] - graphs[-2]


def check_tiny(name: str, settings: dict, samplers: list[Sampler]) -> str:
    """Recorded ranks give the bits of eager ranks, and of one process that plays them."""
    eager, _, _ = play(name, settings, samplers)
    recorded, graphs, late = play(name, settings, samplers, capture=True)
    simulated, _, _ = play(name, settings | {"warm_up_mode": "replicated"}, samplers, simulate=True)
    for what, others in (("eager ranks", eager), ("one process", simulated)):
        for at, pair in enumerate(zip(recorded, others, strict=True)):
            assert torch.equal(*pair), f"sample {at} differs from {what} by {distance(*pair):.1e}"
    assert graphs > 0
    return f"{graphs} graphs, {late} of them in the last sample"


def check_patches(name: str, settings: dict) -> str:
    """Recorded patches give the bits of eager ones; both are those of one process, but for rounding."""
    # sizes in turn, the second in unequal shares
    samplers = [sampler_of(name, size=size) for size in (32, 40, 32)]
    for sampler in samplers:
        sampler.latents, sampler.condition, sampler.kwargs = tree_map(
            lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf,
            (sampler.latents, sampler.condition, sampler.kwargs),
        )
    eager, _, _ = play(name, settings, samplers, dtype=torch.float64)
    recorded, graphs, late = play(name, settings, samplers, dtype=torch.float64, capture=True)
    simulated, _, _ = play(name, settings, samplers, dtype=torch.float64, simulate=True)
    for at, (found, same, near) in enumerate(zip(recorded, eager, simulated, strict=True)):
        assert torch.equal(found, same), f"sample {at} differs from eager ranks by {distance(found, same):.1e}"
        assert distance(found, near) < PATCH_BOUND, f"sample {at} differs by {distance(found, near):.1e}"
    assert graphs > 0
    return f"{graphs} graphs, {late} of them in the last sample"


def check_compiled_patches(settings: dict) -> str:
    """Compiled and recorded patches, of one picture each, stay near to one eager process."""
    sampler, found, graphs = sampler_of("sd21"), {}, 0
    for name, more in (("recorded", {"compile": "blocks", "capture": True}), ("eager", {"simulate": True})):
        denoiser, scheduler, found[name] = nn.Module.to(one_level(64), "cuda", torch.float32), ddim(), []
        with installed(denoiser, scheduler, **settings, **more) as handle:
            for seed in range(3):
                scheduler.set_timesteps(5)
                latents = sampler.latents[:1] + seed
                for t in scheduler.timesteps:
                    estimate = denoiser(latents, t, sampler.kwargs["encoder_hidden_states"][:1]).sample
                    latents = scheduler.step(estimate, t, latents).prev_sample
                found[name].append(latents.clone())
            graphs = max(graphs, handle.num_graphs)
    distances = [distance(*pair) for pair in zip(found["recorded"], found["eager"], strict=True)]
    assert max(distances) < COMPILED_BOUND, f"samples differ by {distances}"
    assert graphs > 0
    return f"{graphs} graphs, {max(distances):.1e} from one eager process"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def full_denoiser(name: str) -> nn.Module:
    """The published size with random weights, the same on all ranks."""
    torch.manual_seed(0)
    denoiser = build_full(name).to_empty(device="cuda")
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    for module in denoiser.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
    for buffer in denoiser.buffers():
        nn.init.normal_(buffer, std=0.02)
    return denoiser


def check_full(name: str, denoiser: nn.Module, settings: dict, steps: int) -> str:
    """Recorded steps stay near to eager ones over a loop; says the times of a step."""
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, device="cuda").to(tensor.dtype)

    (sample, _), kwargs = full_call(name)
    sample, kwargs = draw(sample), tree_map(lambda leaf: draw(leaf), kwargs)
    own = 4 if name == "svd" else sample.shape[1]

    def loop(scheduler) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        latents = sample[:1, :, :own] if name == "svd" else sample[:1]
        for t in scheduler.timesteps:
            given = torch.cat([latents] * 2)
            if name == "svd":
                given = torch.cat([given, sample[:, :, own:]], 2)
            first, second = denoiser(given, t, **kwargs, return_dict=False)[0].chunk(2)
            latents = scheduler.step(first + 3 * (second - first), t, latents).prev_sample
        return latents

    found, times = {}, {}
    for capture in (False, True):
        scheduler = ddim()
        with installed(denoiser, scheduler, capture=capture, **settings) as handle:
            for _ in range(3):
                torch.cuda.synchronize()
                dist.barrier()
                begin = time.perf_counter()
                found[capture] = loop(scheduler)
                torch.cuda.synchronize()
                times[capture] = (time.perf_counter() - begin) / steps * 1e3
            assert handle.capture_refusal == "", handle.capture_refusal
    far = distance(found[True], found[False])
    assert far < FULL_BOUND, f"{far:.1e} from the eager loop, which is more than {FULL_BOUND}"
    peak = torch.cuda.max_memory_reserved() / 2**30
    return (
        f"{far:.1e} from eager; a step {times[False]:.2f} ms eager, {times[True]:.2f} ms recorded; peak {peak:.1f} GiB"
    )


class Table:
    """Runs checks; one fails where it fails on any rank."""

    def __init__(self) -> None:
        self.failures = 0

    def __call__(self, name: str, check: Callable[[], str]) -> None:
        try:
            told, failed = check(), 0
        except Exception as error:
            told, failed = f"{type(error).__name__}: {error}", 1
            traceback.print_exc()
        outcome = torch.tensor([failed], device="cuda")
        dist.all_reduce(outcome)
        self.failures += int(outcome.item() > 0)
        if dist.get_rank() == 0:
            print(f"{'FAIL' if outcome.item() else 'ok':4}  {name:60}  {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", nargs="*", default=[], choices=NAMES, help="full-size denoisers")
    parser.add_argument("--only", choices=("stages", "patches", "compiled"), help="checks of these alone")
    parser.add_argument("--steps", type=int, default=20, help="steps of a full-size loop")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # what cannot be captured is told by the check
    warnings.filterwarnings("ignore", message="The denoiser's inputs changed")
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=60))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    check, world = Table(), dist.get_world_size()
    fitting = [settings for settings in LAYOUTS if world % num_ranks(settings) == 0]
    with torch.no_grad():
        if not arguments.full and arguments.only in (None, "stages"):
            for settings in fitting:
                samplers = [sampler_of("sd21", seed=seed) for seed in range(3)]
                check(f"sd21 {settings}", lambda: check_tiny("sd21", settings, samplers))  # noqa: B023
            # a relay keeps the cut of the first size, and one process that plays it replicated does not
            settings = next(each for each in reversed(fitting) if each.get("warm_up_mode") != "relay")
            for name in NAMES:
                samplers = [sampler_of(name), sampler_of(name, size=16), sampler_of(name), sampler_of(name, size=16)]
                check(f"{name}, two sizes in turn", lambda: check_tiny(name, settings, samplers))  # noqa: B023
        if not arguments.full and arguments.only in (None, "patches"):
            for settings in PATCH_LAYOUTS:
                if world % num_ranks(settings) == 0:
                    check(f"sdxl {settings}", lambda: check_patches("sdxl", settings))  # noqa: B023
            for name in ("sd15", "svd", "animatediff"):
                settings = {"patches": 2, "mode": "corrected_async_gn", "warm_up": 2}
                check(f"{name} {settings}", lambda: check_patches(name, settings))  # noqa: B023
        if not arguments.full and arguments.only in (None, "compiled"):
            for mode in ("full_sync", "corrected_async_gn"):
                settings = {"patches": world, "mode": mode, "warm_up": 1}
                check(f"compiled {settings}", lambda: check_compiled_patches(settings))  # noqa: B023
        torch.backends.cudnn.deterministic = False
        for name in arguments.full:
            denoiser = full_denoiser(name)
            patched = [settings for settings in PATCH_LAYOUTS if world % num_ranks(settings) == 0]
            for settings in fitting + patched:
                if settings.get("warm_up_mode") != "relay" and isinstance(settings.get("warm_up", 3), int):
                    check(f"{name} {settings}", lambda: check_full(name, denoiser, settings, arguments.steps))  # noqa: B023
    dist.barrier()
    dist.destroy_process_group()
    return int(check.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
