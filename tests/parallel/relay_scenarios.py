"""Scenarios of test_ranks.py whose exact steps go from stage to stage: what one process computes whole."""

import pytest
import torch
from denoisers import Sampler, build, ddim
from stage_scenarios import changes, late_receiver, sample, two_calls_a_step
from torch.utils._pytree import tree_map

from asyncdiff_pl.parallel import WarmUp, parallelize


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


RELAYS = {
    2: [
        relay,
        relay_of_other_inputs,
        relay_of_two_calls_a_step,
        relay_before_writing_in_place,
        relay_in_inference_mode,
        relay_in_half_precision,
    ],
    3: [relay_over_three, relay_with_an_extra_rank],
    4: [relay_over_four, relay_of_halves],
}

# -- what is no comparison -----------------------------------------------------------------------------------------


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


RELAY_CHECKS = {2: [relay_is_removed_on_ranks, relay_under_autocast]}
