"""Step parallelism in one process that plays all ranks: what it computes.

The ranks themselves: test_steps_ranks.py. What is refused: test_steps_refusals.py.
"""

import functools

import diffusers
import pytest
import torch
from denoisers import TEXT, Sampler, build, ddim
from diffusers import UNet2DConditionModel
from fake_graph import FakeRecorder, captured
from step_definition import defined
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.steps.settings import Round, round_of
from asyncdiff_pl.parallel.steps.twin import with_cloned_generators

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

denoiser_of = functools.cache(build)
pipeline_of = functools.cache(Sample)

SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}


class Seeded:
    """A scheduler whose steps draw from one generator, as a pipeline lets them; all else is the scheduler's."""

    def __init__(self, scheduler, generator):
        self.scheduler, self.generator = scheduler, generator

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def step(self, *args):
        return self.scheduler.step(*args, generator=self.generator)


def loop(sampler, denoiser, scheduler, num_steps, seed=0):
    """A sample whose noise is of a seed, and the generator that it was drawn from."""
    generator = torch.Generator().manual_seed(seed)
    is_drawn = isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler)
    return sampler(denoiser, Seeded(scheduler, generator) if is_drawn else scheduler, num_steps), generator


def simulated(name, num_steps, scheduler=None, samplers=None, **settings):
    """Some samples with one handle."""
    denoiser, scheduler = denoiser_of(name), scheduler or ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    try:
        return [sampler(denoiser, scheduler, num_steps) for sampler in samplers or [Sampler(name)]]
    finally:
        handle.remove()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


# -- which rank computes what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "steps", "warm_up", "rounds"),
    [
        (7, 2, 3, [None] * 3 + [Round(3, 2)] * 2 + [Round(5, 2)] * 2),
        # a round of one step is an exact step
        (6, 2, 3, [None] * 3 + [Round(3, 2)] * 2 + [None]),
        (6, 3, 1, [None] + [Round(1, 3)] * 3 + [Round(4, 2)] * 2),
        (3, 4, 1, [None] + [Round(1, 2)] * 2),
        (3, 2, 3, [None] * 3),
        (2, 2, 5, [None] * 2),
        (3, 1, 1, [None] * 3),
    ],
)
def test_rounds(num_steps, steps, warm_up, rounds):
    assert [round_of(step, num_steps, steps, warm_up) for step in range(num_steps)] == rounds
    # a pipeline that takes more steps than its scheduler announced
    assert round_of(num_steps, num_steps, steps, warm_up) is None


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "steps", "warm_up"),
    [
        *[("sd21", kind, 2, 1) for kind in SCHEDULERS],
        *[("sd21", kind, 3, 1) for kind in SCHEDULERS if kind != "pndm"],
        ("svd", "dpm++", 4, 2),
        ("animatediff", "ancestral", 3, 1),
    ],
)
def test_it_keeps_to_the_definition(name, kind, steps, warm_up):
    """The last round is shorter than the others, or a single step."""
    denoiser, sampler, num_steps = denoiser_of(name), Sampler(name), 6
    exact, drawn = loop(sampler, denoiser, SCHEDULERS[kind](), num_steps)
    expected = defined(denoiser, sampler, SCHEDULERS[kind](), num_steps, steps, warm_up)
    scheduler = SCHEDULERS[kind]()
    handle = parallelize(denoiser, steps=steps, warm_up=warm_up, simulate=True, scheduler=scheduler)
    found, generator = loop(sampler, denoiser, scheduler, num_steps)
    handle.remove()
    assert distance(found, expected) < 1e-5
    assert distance(expected, exact) > 1e-4
    # what is foreseen draws nothing
    assert torch.equal(generator.get_state(), drawn.get_state())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "svd", "animatediff"])
def test_a_warm_up_of_all_steps_is_exact_to_the_bit(name):
    expected = Sampler(name)(denoiser_of(name), ddim(), 3)
    for steps, warm_up in ((2, 3), (3, 2)):
        assert torch.equal(simulated(name, 3, steps=steps, warm_up=warm_up)[0], expected)


def test_noise_without_a_generator_is_the_same_that_is_foreseen():
    denoiser, sampler = denoiser_of("sd21"), Sampler("sd21")
    scheduler = SCHEDULERS["ancestral"]()
    handle = parallelize(denoiser, steps=2, warm_up=1, simulate=True, scheduler=scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = sampler(denoiser, scheduler, 6)
    handle.remove()
    assert distance(found, defined(denoiser, sampler, SCHEDULERS["ancestral"](), 6, 2, 1)) < 1e-5


def test_inference_mode():
    scheduler = SCHEDULERS["dpm++"]
    expected = simulated("sd21", 5, scheduler(), steps=3, warm_up=2)
    with torch.inference_mode():
        found = simulated("sd21", 5, scheduler(), steps=3, warm_up=2)
    assert torch.equal(found[0], expected[0])


def test_halves_of_the_guidance_batch():
    for name in ("svd", "sdxl"):
        (one,), (two,) = (simulated(name, 5, steps=2, warm_up=2, cfg=cfg) for cfg in (1, 2))
        assert 0 < distance(two, one) < 1e-5


def test_what_was_sampled_before_leaves_no_trace():
    denoiser, scheduler = denoiser_of("sd21"), SCHEDULERS["dpm++"]()
    one, three, large = Sampler("sd21"), Sampler("sd21", batch=3), Sampler("sd21", size=16)
    handle = parallelize(denoiser, steps=3, warm_up=1, simulate=True, scheduler=scheduler)
    alone = one(denoiser, scheduler, 6)
    three(denoiser, scheduler, 4)
    assert torch.equal(one(denoiser, scheduler, 6), alone)
    # broken off before, in and after a round
    for stop in (1, 2, 4):
        large(denoiser, scheduler, 7, stop=stop)
        assert torch.equal(one(denoiser, scheduler, 6), alone)
    one(denoiser, scheduler, 6, stop=3)
    handle.reset()
    assert torch.equal(one(denoiser, scheduler, 6), alone)
    handle.remove()
    exact = one(denoiser, SCHEDULERS["dpm++"](), 6)
    assert torch.equal(one(denoiser, scheduler, 6), exact)
    assert "step" not in vars(scheduler)


def test_counts():
    denoiser, scheduler, sampler = denoiser_of("sd21"), ddim(), Sampler("sd21")
    handle = parallelize(denoiser, steps=3, warm_up=2, cfg=2, simulate=True, scheduler=scheduler)
    calls = []
    with_calls = denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    sampler(denoiser, scheduler, 7)
    with_calls.remove()
    # two halves of each step, however the steps are shared out
    assert len(calls) == 2 * 7
    assert (handle.exact_steps, handle.asynchronous_steps) == (2, 5)
    # each half's ranks send the whole estimate, of both halves, to two others
    assert handle.sent_bytes == 5 * 2 * 2 * (2 * 4 * 8 * 8 * 4)
    assert handle.bytes_per_step == handle.sent_bytes // 5
    handle.remove()


# -- pipelines --------------------------------------------------------------------------------------------------------

# each kind once; schedulers that repeat timesteps, a second call in all steps or in some, several samples at once
STEPPED = ["img2img", "upscale", "sdxl", "sdxl_inpaint", "sd3", "flux_true_cfg", "animatediff", "sd15_heun"]
STEPPED += ["sd21", "flux", "img2img_pndm", "sd3_skips_layers", "dit_of_three", "sd15_ip_adapter"]


@functools.cache
def exact(name):
    return pipeline_of(name)()


@pytest.mark.parametrize("name", STEPPED)
def test_pipelines(name):
    sample = pipeline_of(name)
    handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
    found = sample()
    assert handle.asynchronous_steps > 0
    handle.remove()
    assert 0 < distance(found, exact(name)) < 0.1


def test_a_pipeline_that_drops_half_of_what_it_stepped():
    """DiT's steps both halves, each with noise of its own, and goes on with the first one."""
    sample = Sample("dit")
    sample.pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    expected = sample()
    handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
    assert 0 < distance(sample(), expected) < 0.1
    handle.remove()


def test_a_generator_that_is_given_twice_is_one():
    """As for DiT's, whose halves draw from the generator of their picture."""
    generator = torch.Generator().manual_seed(0)
    first, second, other = with_cloned_generators([generator, generator, torch.Generator()])
    assert first is second
    assert first is not other
    drawn = [torch.rand((), generator=each) for each in (first, second)]
    assert [torch.rand((), generator=generator) for _ in drawn] == drawn


def test_guidance_that_ends_begins_a_warm_up():
    sample = pipeline_of("sd15_guidance_ends")
    for cfg in (1, 2):
        handle = parallelize(sample.pipe, steps=2, warm_up=1, cfg=cfg, simulate=True)
        with pytest.warns(UserWarning, match="inputs changed at step 3 of a sample: warm-up starts again"):
            found = sample()
        # steps 1 and 2 are a round, and so are 4 and 5
        assert (handle.exact_steps, handle.asynchronous_steps) == (2, 4)
        handle.remove()
        assert 0 < distance(found, exact("sd15_guidance_ends")) < 0.1


def test_what_is_kept_of_a_round_is_not_given_to_other_inputs():
    """Guidance ends within a round."""
    sample = pipeline_of("sd15_guidance_ends")
    handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
    with pytest.warns(UserWarning, match="inputs changed at step 3"):
        found = sample()
    assert (handle.exact_steps, handle.asynchronous_steps) == (5, 1)
    handle.remove()
    assert torch.equal(found, exact("sd15_guidance_ends"))


# -- captured and compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"), [("sd21", {"steps": 3, "warm_up": 2, "cfg": 2}), ("svd", {"steps": 2, "warm_up": 1})]
)
def test_replays_give_the_same_bits(name, settings):
    samplers = [Sampler(name, seed=seed) for seed in range(2)]
    expected = simulated(name, 5, samplers=samplers, **settings)
    with captured(FakeRecorder()) as recorder:
        denoiser, scheduler = denoiser_of(name), ddim()
        handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=True, **settings)
        found = [sampler(denoiser, scheduler, 5) for sampler in samplers]
        # rounds and exact steps are one
        assert handle.num_graphs == 1
        handle.remove()
    assert all(map(torch.equal, found, expected))
    # all calls but the first one, which is run
    assert recorder.replays == 2 * 5 - 1
    assert recorder.alive == 0


def test_a_pipeline_with_two_calls_a_step_is_captured():
    sample = pipeline_of("flux_true_cfg")
    found = []
    with captured(FakeRecorder()) as recorder:
        for capture in (False, True):
            handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True, capture=capture)
            found.append(sample())
            handle.remove()
    assert torch.equal(*found)
    assert recorder.replays > 0


@pytest.mark.parametrize("compile", ["blocks", "full"])
def test_compiled(compile, monkeypatch):
    graphs = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    denoiser = UNet2DConditionModel(sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, **blocks).eval()
    found = []
    for settings in ({}, {"compile": compile}, {}):
        scheduler = ddim()
        handle = parallelize(denoiser, steps=2, warm_up=1, simulate=True, scheduler=scheduler, **settings)
        found.append(Sampler("sd21")(denoiser, scheduler, 3))
        handle.remove()
    torch._dynamo.reset()
    assert graphs
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
