"""Warm-up by need: what noise and drift say, as tables, and what a denoiser then computes."""

import functools
import itertools

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim

from asyncdiff_pl.parallel import WarmUp, parallelize
from asyncdiff_pl.parallel.warm_up import Drift, Span, count_exact, is_still, noise_levels, span_of

LEVELS = [1.0, 0.95, 0.9, 0.5, 0.1]
OPEN = None
"""All steps that there are."""

denoiser_of = functools.cache(build)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither until_noise nor until_drift: give one of them, or a number of steps"),
        ({"until_noise": 1.1}, "until_noise is 1.1; it is a share of noise and must be from 0 to 1"),
        ({"until_noise": -0.1}, "until_noise is -0.1"),
        ({"until_drift": 0.0}, "until_drift is 0.0; it is a relative change and must be above 0"),
        ({"until_drift": 0.1, "at_least": 0}, "at_least is 0; at least 1 exact step"),
        ({"until_drift": 0.1, "at_least": 3, "at_most": 2}, "at_most is 2, but at_least is 3; give at_least or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmUp(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"until_noise": 0.8}, "until noise 0.8"),
        ({"until_drift": 0.1, "at_least": 2, "at_most": 10}, "until drift 0.1, at least 2, at most 10"),
        ({"until_noise": 1, "until_drift": 0.05}, "until noise 1 and until drift 0.05"),
    ],
)
def test_in_words(settings, text):
    assert str(WarmUp(**settings)) == text


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [
        (3, (3, 3)),
        (WarmUp(until_noise=1.0), (1, 1)),
        # the first asynchronous step is the first with no more noise than that
        (WarmUp(until_noise=0.95), (1, 1)),
        (WarmUp(until_noise=0.94), (2, 2)),
        (WarmUp(until_noise=0.5), (3, 3)),
        (WarmUp(until_noise=0.0), (5, 5)),
        (WarmUp(until_noise=0.95, at_least=3), (3, 3)),
        (WarmUp(until_noise=0.5, at_most=2), (2, 2)),
        # one step alone does not drift
        (WarmUp(until_drift=0.1), (2, OPEN)),
        (WarmUp(until_drift=0.1, at_most=1), (1, 1)),
        (WarmUp(until_drift=0.1, at_least=4, at_most=9), (4, 9)),
        # both must hold
        (WarmUp(until_noise=0.5, until_drift=0.1), (3, OPEN)),
        (WarmUp(until_noise=0.0, until_drift=0.1, at_most=4), (4, 4)),
    ],
)
def test_how_long_warm_up_may_last(warm_up, expected):
    assert span_of(warm_up, lambda: LEVELS) == Span(*expected)


@pytest.mark.parametrize(
    ("warm_up", "expected"), [(WarmUp(until_noise=0.5), (1, OPEN)), (WarmUp(until_noise=0.5, at_most=7), (1, 7))]
)
def test_before_noise_is_known(warm_up, expected):
    assert span_of(warm_up, None) == Span(*expected)


@pytest.mark.parametrize(
    ("steps", "still", "expected"),
    [(1, True, False), (2, True, True), (2, False, False), (3, False, False), (4, False, True)],
)
def test_drift_ends_warm_up_within_its_bounds(steps, still, expected):
    assert Span(2, 4).ends(steps, still) is expected


@pytest.mark.parametrize(
    ("warm_up", "refresh_every", "num_steps", "expected"),
    [(3, None, 25, 3), (3, 5, 25, 7), (3, 22, 25, 4), (3, 23, 25, 3), (9, 2, 5, 5), (1, 2, 4, 2)],
)
def test_exact_steps_of_a_sample(warm_up, refresh_every, num_steps, expected):
    assert count_exact(warm_up, refresh_every, num_steps) == expected


# -- noise ------------------------------------------------------------------------------------------------------------

KINDS = (
    *("DDIM", "DDPM", "LCM", "TCD", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    *("SASolver", "EDMEuler", "EDMDPMSolverMultistep"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
)


def scheduler_of(kind, **config):
    return getattr(diffusers, f"{kind}Scheduler")(**config)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_falls_from_all_to_nearly_none(kind):
    scheduler = scheduler_of(kind)
    scheduler.set_timesteps(40)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps)
    # LCM and TCD know 50 timesteps, of which the last is at 19
    assert levels[0] > 0.98 and levels[-1] < 0.2
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(levels))


def test_schedulers_of_one_noise_schedule_agree():
    """DDIM looks it up, Euler has sigmas, Heun repeats them, KDPM2's timesteps lie between."""
    expected = None
    for kind in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "KDPM2Discrete"):
        scheduler = scheduler_of(kind, timestep_spacing="trailing", beta_start=0.001, beta_end=0.02)
        scheduler.set_timesteps(10)
        found = dict(zip(scheduler.timesteps.tolist(), noise_levels(scheduler), strict=True))
        expected = expected or found
        assert all(found[t] == pytest.approx(level, abs=1e-4) for t, level in expected.items() if t in found)
        assert sum(t in found for t in expected) > 5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_has_sigma_itself(shift):
    scheduler = scheduler_of("FlowMatchEulerDiscrete", shift=shift)
    scheduler.set_timesteps(10)
    assert noise_levels(scheduler) == pytest.approx(scheduler.sigmas[:-1].tolist())
    unipc = scheduler_of("UniPCMultistep", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    unipc.set_timesteps(10)
    assert noise_levels(unipc) == pytest.approx(unipc.sigmas[:-1].tolist())


def test_continuous_timesteps():
    """Stable Video Diffusion's are no indices."""
    scheduler = scheduler_of("EulerDiscrete", timestep_type="continuous", use_karras_sigmas=True, sigma_max=700.0)
    scheduler.set_timesteps(25)
    sigma = scheduler.sigmas[10].double()
    assert noise_levels(scheduler)[10] == pytest.approx(float(sigma / (1 + sigma**2).sqrt()))


def test_a_scheduler_that_does_not_tell():
    scheduler, denoiser = scheduler_of("IPNDM"), denoiser_of("sd21")
    with pytest.raises(ValueError, match="IPNDMScheduler does not tell how much noise is left"):
        parallelize(denoiser, stages=2, warm_up=WarmUp(until_noise=0.9), simulate=True, scheduler=scheduler)
    handle = parallelize(denoiser, stages=2, warm_up=WarmUp(until_drift=0.9), simulate=True, scheduler=scheduler)
    handle.remove()


# -- drift ------------------------------------------------------------------------------------------------------------


def test_drift_is_the_change_over_the_norm_of_all_that_is_consumed():
    drift = Drift(3, torch.device("cpu"))
    drift.compare(0, torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    drift.compare(0, torch.zeros(1), torch.tensor([5.0]))
    drift.compare(2, torch.full((2,), 5.0, dtype=torch.float16), torch.full((2,), 5.0, dtype=torch.float16))
    sums = drift.sums()
    assert torch.allclose(sums, torch.tensor([[41.0, 50.0], [0.0, 0.0], [0.0, 50.0]]).double())
    assert is_still(sums, 0.65) and not is_still(sums, 0.63)


def test_what_is_not_a_number_is_never_still():
    assert not is_still(torch.tensor([[float("nan"), 1.0]]), 0.5)
    assert not is_still(torch.tensor([[float("inf"), float("inf")]]), 0.5)
    assert is_still(torch.zeros(2, 2), 0.5)


# -- a denoiser -------------------------------------------------------------------------------------------------------


def sample(steps=8, name="sd21", sampler=None, start=0, **settings):
    """Latents and the number of exact steps."""
    denoiser, scheduler = denoiser_of(name), ddim()
    settings = {"stages": 2} | settings
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    try:
        latents = (sampler or Sampler(name))(denoiser, scheduler, steps, start=start)
        return latents, handle.exact_steps
    finally:
        handle.remove()


MODES = [
    {},
    {"stages": 3, "stride": 2, "time_shift": True},
    {"stages": 4, "cfg": 2},
    {"stages": 8, "name": "sdxl"},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("warm_up", "steps"), [(WarmUp(until_noise=0.9), 4), (WarmUp(until_drift=1e9), 2)])
def test_an_end_by_need_gives_what_the_same_count_gives(mode, warm_up, steps):
    found, exact = sample(warm_up=warm_up, **mode)
    assert exact == steps
    expected, exact = sample(warm_up=steps, **mode)
    assert exact == steps
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stages", [2, 5])
def test_drift_ends_warm_up_as_soon_as_it_is_low(stages):
    """The lower the threshold the longer it lasts; bounds hold; without stages there is none to measure."""
    counts = [sample(warm_up=WarmUp(until_drift=d), stages=stages)[1] for d in (1.0, 0.5, 0.3, 1e-6)]
    assert counts == sorted(counts) and counts[0] < counts[2] <= counts[-1] == 8
    assert sample(warm_up=WarmUp(until_drift=1e-6, at_most=3), stages=stages)[1] == 3
    assert sample(warm_up=WarmUp(until_drift=1.0, at_least=6), stages=stages)[1] == 6
    assert sample(warm_up=WarmUp(until_drift=1.0), stages=1, cfg=2)[1] == 8


def test_each_sample_has_a_warm_up_of_its_own():
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    first, second = Sampler("sd21"), Sampler("sd21", seed=6)
    expected = [sample(sampler=sampler, warm_up=WarmUp(until_drift=0.4))[0] for sampler in (first, second)]
    handle = parallelize(denoiser, stages=2, warm_up=WarmUp(until_drift=0.4), simulate=True, scheduler=scheduler)
    for sampler, latents in zip((first, second, first), (*expected, expected[0]), strict=True):
        sampler(denoiser, scheduler, 8, stop=3)
        assert torch.equal(sampler(denoiser, scheduler, 8), latents)
    handle.remove()


def test_a_sliced_schedule_begins_with_the_noise_that_it_has():
    assert sample(steps=16, warm_up=WarmUp(until_noise=0.9))[1] == 9
    assert sample(steps=16, start=5, warm_up=WarmUp(until_noise=0.9))[1] == 4
    assert sample(steps=16, start=10, warm_up=WarmUp(until_noise=0.9))[1] == 1


@pytest.mark.parametrize("mode", MODES)
def test_refreshes_are_exact(mode):
    """With one in each two steps, every asynchronous step sees what was made exactly in the step before."""
    exact = Sampler(mode.get("name", "sd21"))(denoiser_of(mode.get("name", "sd21")), ddim(), 8)
    mode = {**mode, "time_shift": False}
    plain, _ = sample(warm_up=1, **mode)
    refreshed, steps = sample(warm_up=1, refresh_every=2, **mode)
    assert steps == 1 + 3
    assert (refreshed - exact).norm() < (plain - exact).norm()
    beyond, steps = sample(warm_up=1, refresh_every=9, **mode)
    assert steps == 1
    assert torch.equal(beyond, plain)


def test_a_refresh_begins_again_what_a_shorter_sample_would():
    """A step after a refresh is a first step after warm-up: two calls of the same inputs say the same."""
    denoiser, sampler = denoiser_of("sd21"), Sampler("sd21")
    after = []
    for settings in ({"warm_up": 6}, {"warm_up": 3, "refresh_every": 3}):
        scheduler = ddim()
        handle = parallelize(denoiser, stages=2, stride=2, simulate=True, scheduler=scheduler, **settings)
        scheduler.set_timesteps(8)
        estimates = []
        for t in scheduler.timesteps:
            # the same latents in every step: what was computed before leaves no trace but in stale values
            estimates.append(sampler.estimate(denoiser, scheduler, sampler.latents, t))
            scheduler.step(estimates[-1], t, sampler.latents)
        after.append(estimates[6:])
        handle.remove()
    assert torch.equal(torch.stack(after[0]), torch.stack(after[1]))


def test_exact_steps_on_one_rank():
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    handle = parallelize(denoiser, scheduler=scheduler)
    Sampler("sd21")(denoiser, scheduler, 5)
    assert handle.exact_steps == 5
    handle.remove()
