"""Every kind of pipeline, and what users do to it: tiny pipelines of diffusers' own classes, all ranks in one process.

The ranks themselves: test_ranks.py.
"""

import contextlib
import copy
import functools

import pytest
import torch
from definition import Definition
from denoisers import deviation_error
from tiny_pipelines import CASES, KINDS, Sample

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

pytestmark = [
    # schedulers in NumPy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # guidance that ends
    pytest.mark.filterwarnings("ignore:The denoiser's inputs changed"),
]

ALL = [*KINDS, *CASES]
GUIDED = [name for name, kind in KINDS.items() if kind.has_guidance_batch]
GUIDED += ["sd15_guidance_ends", "sdxl_guidance_ends", "sd3_guidance_ends", "sd3_skips_layers", "controlnet_guesses"]
GUIDED += ["sd15_ip_adapter", "sdxl_ip_adapter", "dit_of_three", "animatediff_of_three"]

# steps that a pipeline takes where they are not what it is asked for
STEPS = {"img2img": 6, "sdxl_inpaint": 6, "sd15_pndm": 7, "sd15_heun": 11, "img2img_pndm": 7, "img2img_heun": 11}

sample_of = functools.cache(Sample)


@functools.cache
def exact(name: str) -> torch.Tensor:
    return sample_of(name)()


@contextlib.contextmanager
def installed(name: str, **settings):
    handle = parallelize(sample_of(name).pipe, simulate=True, **settings)
    try:
        yield handle
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [name for name in CASES if name not in STEPS])
def test_warm_up_to_the_end_changes_no_bit(name):
    with installed(name, stages=2, warm_up=100):
        assert torch.equal(sample_of(name)(), exact(name))


@pytest.mark.parametrize("name", KINDS)
def test_one_stage_changes_no_bit(name):
    with installed(name):
        assert torch.equal(sample_of(name)(), exact(name))


class Diary(TrajectoryListener):
    """Notes when samples begin, and each call of the denoiser."""

    def __init__(self):
        self.samples, self.calls, self.steps = 0, [], 0

    def on_sample_begin(self, trajectory):
        self.samples += 1

    def on_denoiser_call(self, trajectory):
        self.calls.append((trajectory.position, trajectory.call))

    def on_step(self, trajectory, output):
        self.steps += 1


@pytest.mark.parametrize("name", [*KINDS, *(name for name in CASES if name in STEPS)])
def test_samples_steps_and_calls_are_seen_and_warm_up_and_removal_change_no_bit(name):
    sample, expected, diary = sample_of(name), exact(name), Diary()
    trajectory = Trajectory(sample.denoiser, lambda: sample.pipe.scheduler)
    trajectory.subscribe(diary)
    with installed(name, stages=2, warm_up=100, trajectory=trajectory) as handle:
        assert torch.equal(sample(), expected)
        assert len(handle.cut) == 2
    assert torch.equal(sample(), expected)
    trajectory.remove()
    steps, calls = STEPS.get(name, 6), 2 if name == "flux_true_cfg" else 1
    assert (diary.samples, diary.steps, trajectory.num_steps) == (2, 2 * steps, steps)
    assert diary.calls == 2 * [(step, call) for step in range(steps) for call in range(calls)]


@pytest.mark.parametrize("name", GUIDED)
def test_halves_of_the_guidance_batch_give_the_whole(name):
    with installed(name, cfg=2):
        found = sample_of(name)()
    assert float((found - exact(name)).norm() / exact(name).norm()) < 1e-5


class Defined:
    """Runs a pipeline with the definition of the schedule in its denoiser's place.

    Each denoiser call of a step, and each size of the batch, has a definition of its own.
    """

    def __init__(self, sample: Sample, cut: list[list[str]], divisor: int, **settings):
        self.sample, self.settings = sample, settings | {"cut": cut, "divisor": divisor}
        self.parts: dict[tuple[int, int], Definition] = {}
        self.position = self.call = 0

    def __call__(self) -> torch.Tensor:
        denoiser, scheduler = self.sample.denoiser, self.sample.pipe.scheduler
        original, step = copy.deepcopy(denoiser), scheduler.step

        def run(*args, **kwargs):
            latents = args[0] if args else kwargs["hidden_states"]
            key = self.call, len(latents)
            self.call += 1
            if key not in self.parts:
                timesteps = scheduler.timesteps[(getattr(scheduler, "begin_index", None) or 0) + self.position :]
                self.parts[key] = Definition(copy.deepcopy(original), timesteps=timesteps, **self.settings)
            return self.parts[key](*args, **kwargs)

        def count(*args, **kwargs):
            self.position, self.call = self.position + 1, 0
            return step(*args, **kwargs)

        denoiser.forward, scheduler.step = run, functools.wraps(step)(count)
        try:
            return self.sample()
        finally:
            del denoiser.forward, scheduler.step


SD3_IN_TWO = [["pos_embed", *(f"transformer_blocks.{at}" for at in (0, 1))]]
SD3_IN_TWO.append([*(f"transformer_blocks.{at}" for at in (2, 3)), "norm_out", "proj_out"])
STRIDE = {"stages": 2, "stride": 2, "warm_up": 1}
DEFINED = [
    ("sd3", {"stages": 3, "warm_up": 1}),
    ("sd3", STRIDE | {"time_shift": True}),
    ("flux", {"stages": 4, "warm_up": 2, "time_shift": True}),
    ("flux_true_cfg", STRIDE),
    ("dit", {"stages": 4, "warm_up": 2}),
    ("dit", STRIDE),
    ("animatediff", {"stages": 4, "warm_up": 2}),
    ("upscale", STRIDE),
    ("sdxl_controlnets", {"stages": 3, "warm_up": 2}),
    ("sd15_heun", STRIDE | {"time_shift": True}),
    ("img2img_heun", STRIDE | {"time_shift": True}),
    ("sd3_skips_layers", STRIDE | {"cut": SD3_IN_TWO}),
    ("sd15_guidance_ends", {"stages": 2, "warm_up": 1}),
    ("sdxl_ip_adapter", {"stages": 3, "warm_up": 2}),
    ("flux_ip_adapter", {"stages": 3, "warm_up": 2}),
    ("sd15_lora", {"stages": 2, "warm_up": 1}),
    ("animatediff_of_three", STRIDE),
]


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name, settings in DEFINED if name in ALL])
def test_simulation_keeps_to_the_definition(name, settings):
    sample = sample_of(name)
    with installed(name, **settings) as handle:
        found = sample()
    timing = {key: value for key, value in settings.items() if key not in ("stages", "cut")}
    expected = Defined(sample, handle.cut, 1000 if name.startswith("flux") else 1, **timing)()
    assert len(handle.cut) == settings["stages"]
    assert deviation_error(found, expected, exact(name)) < 1e-5


def test_attention_layers_that_are_skipped_are_another_network():
    """What is kept of one choice of layers must not serve another."""
    sample = Sample("sd3_skips_layers")
    results = []
    for choices in ([1], [2]), ([2],):
        handle = parallelize(sample.pipe, simulate=True, stages=2, warm_up=1)
        for layers in choices:
            sample.more["skip_guidance_layers"] = layers
            latents = sample()
        handle.remove()
        results.append(latents)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_halves_need_guidance(name):
    sample = Sample(name)
    sample.more["guidance_scale"] = 1.0
    handle = parallelize(sample.pipe, simulate=True, cfg=2)
    with pytest.raises(ValueError, match="called with a batch of 1: turn guidance on"):
        sample()
    handle.remove()
