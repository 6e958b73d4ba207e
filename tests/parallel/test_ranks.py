"""The ranks themselves, over gloo: each scenario gives to the bit what all ranks in one process give.

With patches all but for rounding: one process computes the rows of all patches at once.

Processes are dear: one world of 2, one of 3 and one of 4 ranks, in each of which all its scenarios are played.
"""

import time

import pytest
import reference
import torch
import torch.distributed as dist
from cuts import split_attentions
from denoisers import NAMES, Sampler, build, ddim
from diffusers import DDPMScheduler
from fake_graph import FakeRecorder, captured
from patch_scenarios import PATCH_CHECKS, PATCHES
from pipeline_scenarios import PIPELINES
from ranks import run_ranks, same
from torch.utils._pytree import tree_map
from traces import known_traces, shared_traces, take_traces

from asyncdiff_pl.parallel import WarmUp, parallelize

# -- scenarios: each returns latents, the same for the ranks and for one process that plays them ------------------


def sample(name, simulate, samplers=None, steps=7, **settings):
    """Some samples with one handle."""
    denoiser, scheduler = build(name), ddim()
    parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    return [sampler(denoiser, scheduler, steps) for sampler in samplers or [Sampler(name)]]


def guidance(simulate):
    return [latents for name in NAMES for latents in sample(name, simulate, steps=4, cfg=2)]


def guidance_and_stages(simulate):
    found = sample("sdxl", simulate, stages=2, cfg=2)
    return found + sample("animatediff", simulate, stages=2, cfg=2, warm_up=2, steps=6)


def blocks_of_an_attention(simulate):
    """An attention's blocks lie in several stages, and both ends of the denoiser in one."""
    return sample("sdxl", simulate, stages=3, warm_up=1, cut=split_attentions(3))


def ahead_with_an_extra_rank(simulate):
    return sample("sdxl", simulate, stages=3, stride=2, warm_up=2, time_shift=True, steps=9)


def changes(simulate, **settings):
    """Another resolution, another batch, a batch that grows in mid-sample, broken off samples, a reset."""
    settings = {"stages": 2, "warm_up": 2} | settings
    denoiser, scheduler = build("sd21"), ddim()
    one, large, two = Sampler("sd21"), Sampler("sd21", size=16), Sampler("sd21", batch=2)
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    found = [sampler(denoiser, scheduler, 5) for sampler in (one, large, two, one)]
    # in warm-up, and where messages are under way
    for stop in (1, 4):
        found.append(large(denoiser, scheduler, 7, stop=stop))
        found.append(one(denoiser, scheduler, 5))
    one(denoiser, scheduler, 7, stop=4)
    handle.reset()
    found.append(one(denoiser, scheduler, 5))
    scheduler.set_timesteps(8)
    latents = one.latents
    for step, t in enumerate(scheduler.timesteps):
        if step == 4:
            latents = torch.cat([latents] * 2)
        estimate = (one if step < 4 else two).estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    return [*found, latents]


def changes_with_stride(simulate):
    return changes(simulate, stride=2)


def two_calls_a_step(simulate, **settings):
    denoiser, scheduler = build("sd21"), ddim()
    main, extra = Sampler("sd21"), Sampler("sd21", seed=8)
    settings = {"stages": 2, "warm_up": 2} | settings
    parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    scheduler.set_timesteps(9)
    latents = main.latents
    for step, t in enumerate(scheduler.timesteps):
        estimate = main.estimate(denoiser, scheduler, latents, t)
        if step >= 2:
            estimate = estimate + 0.5 * extra.estimate(denoiser, scheduler, latents, t)
        latents = scheduler.step(estimate, t, latents).prev_sample
    return [latents]


def by_need(simulate, **settings):
    """Warm-ups that end when drift is low: all ranks must come to it in the same step, sample by sample."""
    denoiser, scheduler, found = build("sd21"), ddim(), []
    settings = {"stages": 2, "warm_up": WarmUp(until_drift=0.35), "refresh_every": 3} | settings
    handle = parallelize(denoiser, simulate=simulate, scheduler=scheduler, **settings)
    for sampler, start in ((Sampler("sd21"), 0), (Sampler("sd21", seed=6, batch=2), 0), (Sampler("sd21"), 3)):
        found.append(sampler(denoiser, scheduler, 11, start=start))
        assert 1 < handle.exact_steps < 11 - start
        found.append(torch.tensor(handle.exact_steps))
    return found


def by_need_in_two_calls_a_step(simulate):
    return two_calls_a_step(simulate, warm_up=WarmUp(until_drift=0.35), refresh_every=3)


def by_need_with_an_extra_rank(simulate):
    return by_need(simulate, stride=2, time_shift=True, refresh_every=4)


def by_need_with_guidance(simulate):
    return by_need(simulate, cfg=2, warm_up=WarmUp(until_noise=0.97, until_drift=0.35, at_most=6))


def late_receiver(simulate, **settings):
    """FreeU writes into what was sent while the other rank is not there yet to receive it."""
    inside = [f"up_blocks.1.{part}" for part in ("resnets.0", "attentions.0")]
    after = [f"up_blocks.1.{part}" for part in ("resnets.1", "attentions.1", "resnets.2", "attentions.2", "upsamplers")]
    cut = [["conv_in", "down_blocks", "mid_block", "up_blocks.0", *inside]]
    cut.append([*after, "up_blocks.2", "up_blocks.3", "conv_norm_out", "conv_out"])
    denoiser, scheduler = build("sd15"), ddim()
    denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6)
    parallelize(denoiser, stages=2, warm_up=1, cut=cut, simulate=simulate, scheduler=scheduler, **settings)

    def before_step(step):
        if not simulate and dist.get_rank() == 1:
            time.sleep(0.1)
        return {}

    return [Sampler("sd15")(denoiser, scheduler, 6, before_step)]


def inference_mode(simulate):
    with torch.inference_mode():
        found = sample("sdxl", simulate, [Sampler("sdxl"), Sampler("sdxl", batch=2)], stages=2, warm_up=1, steps=5)
        found += sample("svd", simulate, stages=2, warm_up=1, steps=4)
        return [latents.clone() for latents in found]


def autocast(simulate):
    with torch.autocast("cpu", torch.bfloat16):
        return sample("sd21", simulate, stages=2, warm_up=1)


# -- exact steps from stage to stage: the ranks compute in relay what one process computes whole -------------------


def in_relay(simulate, **settings):
    return settings if simulate else {"warm_up_mode": "relay"} | settings


def relay(simulate):
    kinds = ("sdxl", "animatediff")
    return [latents for name in kinds for latents in sample(name, simulate, steps=4, **in_relay(simulate, stages=2))]


def relay_of_other_inputs(simulate):
    """The first cut that is found serves all of them, since weights stay where they are."""
    if not simulate:
        return changes(simulate, warm_up_mode="relay")
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, stages=2, simulate=True, scheduler=scheduler)
    Sampler("sd21")(denoiser, scheduler, 1)
    return changes(simulate, cut=handle.cut)


def relay_of_two_calls_a_step(simulate):
    return two_calls_a_step(simulate, **in_relay(simulate))


def relay_before_writing_in_place(simulate):
    return late_receiver(simulate, **in_relay(simulate))


def relay_in_inference_mode(simulate):
    with torch.inference_mode():
        return [latents.clone() for latents in sample("sd21", simulate, steps=4, **in_relay(simulate, stages=2))]


def relay_in_half_precision(simulate):
    denoiser, scheduler, sampler = build("svd").to(torch.bfloat16), ddim(), Sampler("svd")
    sampler.latents, sampler.condition, sampler.kwargs = tree_map(
        lambda tensor: tensor.to(torch.bfloat16), (sampler.latents, sampler.condition, sampler.kwargs)
    )
    parallelize(denoiser, simulate=simulate, scheduler=scheduler, **in_relay(simulate, stages=2))
    return [sampler(denoiser, scheduler, 4)]


def relay_over_three(simulate):
    settings = in_relay(simulate, stages=3, warm_up=2, refresh_every=3)
    return [latents for name in ("sdxl", "svd") for latents in sample(name, simulate, **settings)]


def relay_with_an_extra_rank(simulate):
    return sample("sd21", simulate, steps=9, **in_relay(simulate, stages=2, stride=2, time_shift=True, refresh_every=4))


def relay_over_four(simulate):
    settings = in_relay(simulate, stages=4, warm_up=WarmUp(until_noise=0.97))
    return sample("animatediff", simulate, **settings)


def relay_of_halves(simulate):
    return sample("sdxl", simulate, **in_relay(simulate, stages=2, cfg=2))


# -- recorded steps: replays with their messages compute what one process computes without --------------------------


def recorded(scenario, simulate, *args, **settings):
    """A scenario whose steps are replayed on ranks."""
    if simulate:
        return scenario(*args, simulate, **settings)
    with captured(FakeRecorder()) as recorder:
        found = scenario(*args, simulate, capture=True, **settings)
    assert recorder.replays > 0
    return found


def three_samples(name, simulate, **settings):
    return sample(name, simulate, [Sampler(name, seed=seed) for seed in range(3)], **settings)


def recorded_in_two(simulate):
    found = recorded(three_samples, simulate, "sd15", stages=2, warm_up=2)
    return found + recorded(three_samples, simulate, "svd", cfg=2, steps=3)


def recorded_changes(simulate):
    return recorded(changes, simulate)


def recorded_two_calls_a_step(simulate):
    return recorded(two_calls_a_step, simulate)


def recorded_by_need(simulate):
    return recorded(by_need, simulate)


def recorded_relay(simulate):
    return recorded(three_samples, simulate, "sd21", **in_relay(simulate, stages=2, refresh_every=3))


def recorded_with_an_extra_rank(simulate):
    return recorded(three_samples, simulate, "sd21", stages=2, stride=2, warm_up=2, time_shift=True)


def recorded_in_four(simulate):
    found = recorded(three_samples, simulate, "sd15", stages=2, cfg=2, refresh_every=3)
    return found + recorded(three_samples, simulate, "sd21", stages=4, warm_up=1)


SCENARIOS = {
    2: [
        guidance,
        changes,
        two_calls_a_step,
        by_need,
        by_need_in_two_calls_a_step,
        late_receiver,
        inference_mode,
        autocast,
        relay,
        relay_of_other_inputs,
        relay_of_two_calls_a_step,
        relay_before_writing_in_place,
        relay_in_inference_mode,
        relay_in_half_precision,
        recorded_in_two,
        recorded_changes,
        recorded_two_calls_a_step,
        recorded_by_need,
        recorded_relay,
    ],
    3: [
        changes_with_stride,
        blocks_of_an_attention,
        by_need_with_an_extra_rank,
        relay_over_three,
        relay_with_an_extra_rank,
        recorded_with_an_extra_rank,
    ],
    4: [
        guidance_and_stages,
        ahead_with_an_extra_rank,
        by_need_with_guidance,
        relay_over_four,
        relay_of_halves,
        recorded_in_four,
    ],
}

# -- what is no comparison -----------------------------------------------------------------------------------------


def ranks_with_other_noise(rank):
    for seeds in ((0, 1), (1, 0)):
        denoiser, scheduler = build("sd21"), ddim()
        handle = parallelize(denoiser, stages=2, scheduler=scheduler)
        with pytest.raises(ValueError, match=r"different inputs: .* same seed \(`generator="):
            Sampler("sd21", seed=seeds[rank])(denoiser, scheduler, 5)
        handle.remove()


def ranks_with_another_prompt(rank):
    """One of them an empty one, which is all zeros."""
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    sampler.kwargs["encoder_hidden_states"] *= rank
    handle = parallelize(denoiser, stages=2, scheduler=scheduler)
    with pytest.raises(ValueError, match="different inputs"):
        sampler(denoiser, scheduler, 5)
    handle.remove()


def ranks_with_other_noise_in_the_steps(rank):
    """The scheduler's own, drawn from the global state."""
    denoiser, scheduler = build("sd21"), DDPMScheduler()
    handle = parallelize(denoiser, stages=2, scheduler=scheduler, warm_up=2)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match=r"drifted apart in the first 2 steps.*`generator=`"):
        Sampler("sd21")(denoiser, scheduler, 5)
    handle.remove()
    handle = parallelize(denoiser, stages=2, scheduler=scheduler, warm_up=2)
    torch.manual_seed(0)
    Sampler("sd21")(denoiser, scheduler, 5)
    handle.remove()


def ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match="does not fit 2 ranks"):
        parallelize(build("sd21"), stages=3, scheduler=ddim())


def removal_on_ranks(rank):
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    expected = sampler(denoiser, ddim(), 5)
    handle = parallelize(denoiser, stages=2, scheduler=scheduler)
    sampler(denoiser, scheduler, 9, stop=5)
    assert handle.bytes_per_step > 0
    # the last stage's outputs go to nobody but by the estimate's broadcast
    assert (handle.sent_bytes > 0) == (rank == 0)
    handle.remove()
    assert torch.equal(sampler(denoiser, scheduler, 5), expected)


def relay_is_removed_on_ranks(rank):
    """With weights of other ranks away while it is there, and a sample broken off."""
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    expected = sampler(denoiser, ddim(), 5)
    handle = parallelize(denoiser, stages=2, warm_up_mode="relay", scheduler=scheduler)
    sampler(denoiser, scheduler, 9, stop=5)
    assert any(weight.isnan().any() for weight in denoiser.parameters())
    handle.remove()
    assert torch.equal(sampler(denoiser, scheduler, 5), expected)


def relay_under_autocast(rank):
    denoiser, scheduler = build("sd21"), ddim()
    handle = parallelize(denoiser, stages=2, warm_up_mode="relay", scheduler=scheduler)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast changes them"):
        Sampler("sd21")(denoiser, scheduler, 5)
    handle.remove()


def refusal_of_one_rank(rank):
    """The other one goes on without recordings, too: their messages are in recordings of both or of none."""
    expected = sample("sd21", True, stages=2)
    denoiser, scheduler = build("sd21"), ddim()
    if rank == 1:
        # it waits for the device, which cannot be recorded
        denoiser.conv_in.register_forward_pre_hook(lambda module, args: float(args[0].sum()) and None)
    with captured(FakeRecorder()) as recorder, pytest.warns(UserWarning, match="Steps are not captured"):
        handle = parallelize(denoiser, stages=2, scheduler=scheduler, capture=True)
        assert torch.equal(Sampler("sd21")(denoiser, scheduler, 7), expected[0])
    assert handle.capture_refusal.startswith(("another rank of the pipeline cannot", "aten._local_scalar")[rank])
    handle.remove()
    assert recorder.alive == recorder.replays == 0


CHECKS = {
    2: [
        ranks_with_other_noise,
        ranks_with_another_prompt,
        ranks_with_other_noise_in_the_steps,
        ranks_that_do_not_fit,
        removal_on_ranks,
        relay_is_removed_on_ranks,
        relay_under_autocast,
        refusal_of_one_rank,
    ]
}


def group_sample(group: int, simulate: bool) -> list[torch.Tensor]:
    """Each data group has samples of its own, the second one more than the first."""
    samplers = [Sampler("sd21", seed=10 * group + i) for i in range(1, 3 + group)]
    return sample("sd21", simulate, samplers, stages=2, warm_up=2)


# -- worlds --------------------------------------------------------------------------------------------------------


def play(rank, world_size, expected, traces):
    take_traces(traces)
    with shared_traces():
        for scenario in SCENARIOS[world_size] + PIPELINES[world_size]:
            same(scenario.__name__, scenario(simulate=False), expected[scenario.__name__])
        for key in reference.keys(world_size)[::3]:
            same(key, [reference.run(key, simulate=False)], expected[key])
    for scenario in PATCHES[world_size]:
        near(scenario.__name__, scenario(simulate=False), expected[scenario.__name__])
    for check in CHECKS.get(world_size, []) + PATCH_CHECKS.get(world_size, []):
        check(rank)
    if world_size == 4:
        same("two data groups", group_sample(rank // 2, simulate=False), expected["groups"][rank // 2])


def near(name, found, expected):
    assert len(found) == len(expected), name
    for at, (latents, simulated) in enumerate(zip(found, expected, strict=True)):
        error = float((latents - simulated).norm() / simulated.norm())
        assert error < 1e-5, f"{name}, sample {at}: rank {dist.get_rank()} is {error:.1e} from the simulation"


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.filterwarnings("ignore:The denoiser's inputs changed", "ignore::DeprecationWarning")
def test_ranks(world_size):
    scenarios = SCENARIOS[world_size] + PIPELINES[world_size] + PATCHES[world_size]
    expected = {scenario.__name__: scenario(simulate=True) for scenario in scenarios}
    # within the bound of the original's latents: test_parity.py
    expected |= {key: [reference.simulated(key)] for key in reference.keys(world_size)[::3]}
    if world_size == 4:
        expected["groups"] = [group_sample(group, simulate=True) for group in range(2)]
    run_ranks(world_size, play, world_size, expected, known_traces())
