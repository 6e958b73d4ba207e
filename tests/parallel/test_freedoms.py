"""What users do to a denoiser or its calls, against the definition of the schedule."""

import functools

import diffusers
import pytest
import torch
from definition import Definition
from denoisers import Sampler, build, ddim, deviation_error

from asyncdiff_pl.parallel import parallelize

# schedulers in NumPy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS, BOUND = 7, 1e-5


def error(name, make=ddim, more=lambda step: {}, change=lambda denoiser: None, sampler=None, start=0, **settings):
    """How far the simulation is from the definition, relative to the deviation from the exact result."""
    settings = {"stages": 2, "warm_up": 2} | settings
    denoiser, sampler, scheduler = build(name), sampler or Sampler(name), make()
    change(denoiser)
    exact = sampler(denoiser, make(), STEPS, more, start)
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    found = sampler(denoiser, scheduler, STEPS, more, start)
    handle.remove()
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    timing = {key: value for key, value in settings.items() if key not in ("stages", "folded")}
    definition = Definition(denoiser, handle.cut, scheduler.timesteps[start:], **timing)
    expected = sampler(definition, scheduler, STEPS, more, start)
    definition.close()
    return deviation_error(found, expected, exact)


def residuals(step: int, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2, channels, size, size, generator=generator) for channels, size in shapes]


def controlnet(step: int) -> dict:
    """Residuals for each skip connection and the middle, others in each step."""
    sizes = [(32, 8)] * 3 + [(32, 4)] * 3 + [(32, 2)] + [(64, 2)] * 2 + [(64, 1)] * 4
    *down, mid = residuals(step, *sizes)
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def t2i_adapter(step: int) -> dict:
    """A list that the UNet takes its entries out of; the same in each step."""
    return {"down_intrablock_additional_residuals": residuals(1, (32, 8), (32, 4), (64, 2), (64, 1))}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd15", {"more": controlnet, "stages": 3}),
        ("sd15", {"more": t2i_adapter, "stages": 4}),
        ("sd15", {"more": t2i_adapter, "stages": 2, "stride": 2}),
        ("sd15", {"change": lambda denoiser: denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6), "stages": 4}),
        ("sdxl", {"change": lambda denoiser: denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6), "stages": 3, "stride": 2}),
        ("sdxl", {"sampler": Sampler("sdxl", batch=2), "stages": 3}),
        ("animatediff", {"sampler": Sampler("animatediff", batch=2)}),
    ],
)
def test_uses(name, settings):
    assert error(name, **settings) < BOUND


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert error("sd21", stages=3) < BOUND


@pytest.mark.parametrize(
    ("kind", "start", "settings"),
    [
        ("EulerDiscrete", 0, {"time_shift": True}),
        ("HeunDiscrete", 0, {"stride": 2, "warm_up": 1}),
        ("DPMSolverMultistep", 0, {"time_shift": True}),
        ("UniPCMultistep", 0, {"stride": 2, "warm_up": 1}),
        ("PNDM", 0, {"stride": 2, "warm_up": 1}),
        ("KDPM2Discrete", 0, {"time_shift": True}),
        # image to image with a strength below 1; the last two are not told where they start
        ("EulerDiscrete", 3, {"stride": 2, "warm_up": 1}),
        ("DDIM", 3, {"stride": 2, "warm_up": 1}),
        ("PNDM", 3, {"time_shift": True, "warm_up": 1}),
    ],
)
def test_schedulers(kind, start, settings):
    # a folded cut's inputs are older: the schedule shows
    assert error("sd21", functools.partial(make, kind), start=start, folded=True, **settings) < BOUND


def make(kind: str):
    config = {"skip_prk_steps": True} if kind == "PNDM" else {}
    return getattr(diffusers, f"{kind}Scheduler")(**config)
