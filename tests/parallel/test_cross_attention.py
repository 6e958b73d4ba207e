"""What cross-attention makes of the texts is computed once a sample, and changes nothing that a user sees."""

import contextlib

import pytest
import torch
from denoisers import Sampler, build, ddim
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from fake_graph import FakeRecorder, captured

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.cross_attention import CrossAttentions
from asyncdiff_pl.parallel.guidance import split_batch

STEPS = 4
CAPTURED = {"capture": True}


def cross_attentions(denoiser):
    return [module for module in denoiser.modules() if isinstance(module, Attention) and module.is_cross_attention]


@contextlib.contextmanager
def installed(monkeypatch, denoiser, scheduler, **settings):
    # what is compiled is tested elsewhere; it takes long
    monkeypatch.setattr(compiling.Compiled, "wrap", lambda self, name, call: call)
    with captured(FakeRecorder()), torch.no_grad():
        handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
        yield handle
        handle.remove()


def count(denoiser, projection):
    """The contexts that a projection of all cross-attention is given."""
    seen = []
    for layer in cross_attentions(denoiser):
        getattr(layer, projection).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd21", {"compile": "blocks"}),
        ("sdxl", {"compile": "blocks", "patches": 2}),
        ("sdxl", CAPTURED | {"stages": 2, "warm_up": 1}),
        ("animatediff", CAPTURED),
    ],
)
def test_keys_are_made_once_a_sample(monkeypatch, name, settings):
    denoiser, scheduler, samplers = build(name), ddim(), [Sampler(name, seed=seed) for seed in (1, 2)]
    plain = {key: value for key, value in settings.items() if key in ("stages", "warm_up", "patches")}
    with installed(monkeypatch, denoiser, scheduler, **plain):
        expected = [sampler(denoiser, scheduler, STEPS) for sampler in samplers]
    denoiser = build(name)
    seen, layers = count(denoiser, "to_k"), len(cross_attentions(denoiser))
    with installed(monkeypatch, denoiser, scheduler, **settings):
        for sampler, latents in zip(samplers, expected, strict=True):
            seen.clear()
            assert torch.equal(sampler(denoiser, scheduler, STEPS), latents)
            assert len(seen) == layers
    assert all(type(layer.processor) is AttnProcessor2_0 for layer in cross_attentions(denoiser))


def changing(sampler, how):
    """What is to be called before each step, to change the sample's text before its third one."""
    own = Sampler("sd21").kwargs["encoder_hidden_states"]

    def change(step):
        if step == 0:
            sampler.kwargs["encoder_hidden_states"] = own.clone()
        elif step == 2 and how == "another tensor":
            sampler.kwargs["encoder_hidden_states"] = own.flip(1)
        elif step == 2 and how == "in place":
            sampler.kwargs["encoder_hidden_states"].mul_(0.5)
        elif step == 2 and how == "longer":
            sampler.kwargs["encoder_hidden_states"] = torch.cat([own, own.flip(1)], 1)
        return {"encoder_attention_mask": torch.tensor([[True] * 3 + [False] * 2] * 2)} if how == "a mask" else {}

    return change


@pytest.mark.parametrize("how", ["another tensor", "in place", "longer", "a mask"])
def test_what_changes_is_seen(monkeypatch, how):
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    with torch.no_grad():
        expected = sampler(denoiser, scheduler, STEPS, changing(sampler, how))
    with installed(monkeypatch, denoiser, scheduler, **CAPTURED):
        for _ in range(2):
            assert torch.equal(sampler(denoiser, scheduler, STEPS, changing(sampler, how)), expected)


def test_weights_that_change_between_samples_are_seen(monkeypatch):
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    with installed(monkeypatch, denoiser, scheduler, **CAPTURED):
        before = sampler(denoiser, scheduler, STEPS)
        for layer in cross_attentions(denoiser):
            layer.to_v.weight.mul_(0.5)
        found = sampler(denoiser, scheduler, STEPS)
    with torch.no_grad():
        assert torch.equal(found, sampler(denoiser, scheduler, STEPS))
    assert not torch.equal(found, before)


def test_halves_that_one_process_plays_have_keys_of_their_own(monkeypatch):
    denoiser, scheduler, sampler = build("sd15"), ddim(), Sampler("sd15")
    with installed(monkeypatch, denoiser, scheduler, cfg=2):
        expected = sampler(denoiser, scheduler, STEPS)
    with installed(monkeypatch, denoiser, scheduler, cfg=2, **CAPTURED):
        assert torch.equal(sampler(denoiser, scheduler, STEPS), expected)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_scales_of_adapters_hold_within_a_call(scale):
    """Keys that are made outside of it would be without them; ranks of half a batch give all arguments by place."""
    denoiser, sampler = build("sd15"), Sampler("sd15")
    given = sampler.kwargs | {"cross_attention_kwargs": None if scale is None else {"scale": scale}}
    call = (sampler.call(sampler.latents), torch.tensor(5)), given
    attentions = CrossAttentions(denoiser, denoiser.forward, is_compiled=True, capture=False)
    for kind, inputs in (("whole", call), ("half", split_batch(denoiser.forward, *call, 1))):
        attentions.look(kind, inputs, is_recorded=False)
        attentions.follow(kind, [inputs])
        assert all((layer.processor.key is None) == (scale is not None) for layer in cross_attentions(denoiser))


def test_a_single_token_is_seen_without_queries(monkeypatch):
    denoiser, scheduler, sampler = build("svd"), ddim(), Sampler("svd")
    with torch.no_grad():
        expected = sampler(denoiser, scheduler, STEPS)
    seen = count(denoiser, "to_q")
    with installed(monkeypatch, denoiser, scheduler, compile="blocks"):
        found = sampler(denoiser, scheduler, STEPS)
    assert not seen
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    with installed(monkeypatch, denoiser, scheduler, **CAPTURED):
        assert torch.equal(sampler(denoiser, scheduler, STEPS), expected)
