"""What is equal to what, to the bit or within rounding; all in one process."""

import contextlib
import copy
import functools

import diffusers
import pytest
import torch
from denoisers import NAMES, Sampler, build, ddim

from asyncdiff_pl.parallel import parallelize

MODES = [
    {"stages": 2},
    {"stages": 3, "warm_up": 1, "time_shift": True},
    {"stages": 2, "stride": 2},
    {"stages": 2, "stride": 2, "cfg": 2, "warm_up": 2},
    {"cfg": 2},
]

denoiser_of = functools.cache(build)


@functools.cache
def exact(name: str, steps: int = 5) -> torch.Tensor:
    return Sampler(name)(denoiser_of(name), steps=steps)


@contextlib.contextmanager
def installed(denoiser, scheduler, **settings):
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    try:
        yield handle
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd21", {}),
        ("sd21", {"stages": 3, "warm_up": 5}),
        ("sd21", {"stages": 2, "stride": 2, "warm_up": 9}),
        ("animatediff", {"warm_up": 1}),
        ("animatediff", {"stages": 2, "warm_up": 5}),
    ],
)
def test_one_rank_or_warm_up_alone_changes_no_bit(name, settings):
    scheduler = ddim()
    with installed(denoiser_of(name), scheduler, **settings):
        for _ in range(2):
            assert torch.equal(Sampler(name)(denoiser_of(name), scheduler, 5), exact(name))


@pytest.mark.parametrize("name", NAMES)
def test_halves_of_the_guidance_batch_give_the_whole(name):
    scheduler = ddim()
    with installed(denoiser_of(name), scheduler, cfg=2):
        found = Sampler(name)(denoiser_of(name), scheduler, 10)
    # with fewer steps rounding grows
    assert float((found - exact(name, 10)).norm() / exact(name, 10).norm()) < 1e-5


@pytest.mark.parametrize("settings", MODES)
def test_two_runs_give_the_same_bits(settings):
    """With one handle and with a new one, and whatever was sampled before."""
    denoiser, scheduler, sampler = denoiser_of("sd21"), ddim(), Sampler("sd21")
    with installed(denoiser, scheduler, **settings):
        first = sampler(denoiser, scheduler, 6)
        Sampler("sd21", seed=6)(denoiser, scheduler, 5)
        assert torch.equal(sampler(denoiser, scheduler, 6), first)
    with installed(denoiser, scheduler, **settings):
        assert torch.equal(sampler(denoiser, scheduler, 6), first)


@pytest.mark.parametrize("settings", MODES[1:4])
def test_a_sample_that_was_broken_off_leaves_no_trace(settings):
    denoiser, scheduler, sampler, other = denoiser_of("sd21"), ddim(), Sampler("sd21"), Sampler("sd21", seed=6)
    with installed(denoiser, scheduler, **settings) as handle:
        first = sampler(denoiser, scheduler, 7)
        for stop in (1, 4):
            other(denoiser, scheduler, 9, stop=stop)
            assert torch.equal(sampler(denoiser, scheduler, 7), first)
        other(denoiser, scheduler, 9, stop=5)
        sent = handle.sent_bytes
        handle.reset()
        assert handle.sent_bytes == sent
        assert torch.equal(sampler(denoiser, scheduler, 7), first)


@pytest.mark.parametrize("name", ["sd21", "sdxl", "svd", "animatediff"])
def test_removal_gives_the_denoiser_back(name):
    denoiser, scheduler = build(name), ddim()
    attributes = {part: set(vars(module)) for part, module in denoiser.named_modules()}
    with installed(denoiser, scheduler, stages=2, warm_up=1):
        Sampler(name)(denoiser, scheduler, 2)
    for part, module in denoiser.named_modules():
        assert set(vars(module)) == attributes[part]
        assert not any(value for key, value in vars(module).items() if key.endswith("_hooks"))
    assert "step" not in vars(scheduler)
    assert torch.equal(Sampler(name)(denoiser, scheduler, 5), exact(name))
    assert torch.equal(Sampler(name)(copy.deepcopy(denoiser), scheduler, 5), exact(name))


def test_hooks_of_others_stay():
    denoiser, scheduler, calls = build("sd21"), ddim(), []
    denoiser.mid_block.register_forward_hook(lambda *_: calls.append("theirs"))
    with installed(denoiser, scheduler, stages=2):
        pass
    Sampler("sd21")(denoiser, scheduler, 3)
    assert calls == ["theirs"] * 3


@pytest.mark.parametrize("settings", [{"stages": 3, "warm_up": 2}, {"stages": 2, "stride": 2, "warm_up": 1}])
def test_another_resolution_or_batch_needs_no_reset(settings):
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    samplers = [Sampler("sd21", size=16), Sampler("sd21", batch=2)]
    expected = []
    for sampler in samplers:
        with installed(denoiser, scheduler, **settings):
            expected.append(sampler(denoiser, scheduler, 6))
    with installed(denoiser, scheduler, **settings):
        for sampler, latents in zip([*samplers, samplers[0]], [*expected, expected[0]], strict=True):
            assert torch.equal(sampler(denoiser, scheduler, 6), latents)


def test_another_batch_in_mid_sample_warms_up_anew():
    """It is told, and the three steps that follow are exact."""
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    one, two = Sampler("sd21"), Sampler("sd21", batch=2)

    def walk(sampler, latents, start, stop):
        for t in scheduler.timesteps[start:stop]:
            latents = scheduler.step(sampler.estimate(denoiser, scheduler, latents, t), t, latents).prev_sample
        return latents

    with installed(denoiser, scheduler, stages=2, warm_up=3):
        scheduler.set_timesteps(10)
        middle = torch.cat([walk(one, one.latents, 0, 5)] * 2)
        with pytest.warns(UserWarning, match="inputs changed at step 5 of a sample: warm-up starts again"):
            late = walk(two, middle, 5, 8)
        found = walk(two, late, 8, 10)
    assert torch.equal(late, walk(two, middle, 5, 8))
    assert not torch.equal(found, walk(two, late, 8, 10))


@pytest.mark.parametrize("state", ["on", "off"])
def test_autocast_may_be_switched_between_samples(state):
    denoiser, scheduler, sampler = denoiser_of("sd21"), ddim(), Sampler("sd21")
    results = []
    for states in ([state], ["off" if state == "on" else "on", state]):
        with installed(denoiser, scheduler, stages=2, warm_up=1):
            for each in states:
                with torch.autocast("cpu", torch.bfloat16, enabled=each == "on"):
                    latents = sampler(denoiser, scheduler, 4)
        results.append(latents)
    assert torch.equal(*results)


def test_a_second_call_in_some_steps_alone_has_a_warm_up_of_its_own():
    """As with skip-layer guidance: nothing of the last sample may show in the next."""
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    main, extra = Sampler("sd21"), Sampler("sd21", seed=8)

    def run(first=3, stop=10):
        scheduler.set_timesteps(10)
        latents = main.latents
        for step, t in enumerate(scheduler.timesteps[:stop]):
            estimate = main.estimate(denoiser, scheduler, latents, t)
            if first <= step < 8:
                estimate = estimate + 0.5 * extra.estimate(denoiser, scheduler, latents, t)
            latents = scheduler.step(estimate, t, latents).prev_sample
        return latents

    with installed(denoiser, scheduler, stages=2, warm_up=2):
        expected = run()
        # broken off where the next sample's second calls begin
        run(first=0, stop=3)
        assert torch.equal(run(), expected)


@pytest.mark.parametrize(
    ("settings", "times"),
    # seven asynchronous steps send six times: nobody would consume the last
    [({"stages": 3}, 6), ({"stages": 2, "stride": 2}, 3), ({"stages": 2, "cfg": 2}, 12)],
)
def test_boundary_tensors_are_counted(settings, times):
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    with installed(denoiser, scheduler, **settings) as handle:
        Sampler("sd21")(denoiser, scheduler)
        assert handle.sent_bytes == times * handle.bytes_per_step > 0
        assert handle.asynchronous_steps == 7


def test_in_inference_mode():
    denoiser, scheduler, results = denoiser_of("sdxl"), ddim(), []
    for mode in (False, True):
        with torch.inference_mode(mode), installed(denoiser, scheduler, stages=3, warm_up=1):
            results.append(Sampler("sdxl")(denoiser, scheduler, 5))
    assert torch.equal(*results)


def test_schedulers_may_be_swapped_between_samples():
    denoiser, sampler = denoiser_of("sd21"), Sampler("sd21")

    class Pipe:
        unet = denoiser
        scheduler = ddim()

    pipe, expected = Pipe(), []
    kinds = [ddim, diffusers.DPMSolverMultistepScheduler]
    for kind in kinds:
        scheduler = kind()
        with installed(denoiser, scheduler, stages=2, warm_up=2):
            expected.append(sampler(denoiser, scheduler, 6))
    handle = parallelize(pipe, stages=2, warm_up=2, simulate=True)
    for kind, latents in zip([*kinds, ddim], [*expected, expected[0]], strict=True):
        pipe.scheduler = kind()
        assert torch.equal(sampler(denoiser, pipe.scheduler, 6), latents)
    handle.remove()
