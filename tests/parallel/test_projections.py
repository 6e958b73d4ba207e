"""Projections of self-attention in one product: the same numbers, fewer products, and weights that are given back."""

import pytest
import torch
from denoisers import NAMES as NAMES_OF_DENOISERS
from denoisers import Sampler, build, ddim, one_level
from diffusers.models.attention_processor import Attention
from torch import nn

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.compiling import Compiled
from asyncdiff_pl.parallel.projections import NAMES, joinable_attentions

CPU = torch.device("cpu")
TOKENS = torch.linspace(-1, 1, 2 * 5 * 8).sin().view(2, 5, 8)


def build_attention(**settings):
    torch.manual_seed(2)
    return Attention(8, heads=2, dim_head=4, **settings).eval().requires_grad_(False)


def products(graphs):
    return sum(graph.code.count("linear(") for graph in graphs)


def prepared(attention):
    compiled = Compiled(attention, {"": attention})
    compiled.prepare(CPU)
    return compiled


@pytest.mark.parametrize("name", NAMES_OF_DENOISERS)
def test_denoisers_compute_the_same_with_fewer_products(name, monkeypatch):
    """As compiled code would, but run as it is, which takes no time to compile."""
    monkeypatch.setattr(Compiled, "wrap", lambda self, name, call: call)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    found, linear = {}, nn.functional.linear
    for kind in ("joined", "apart"):
        if kind == "apart":
            monkeypatch.setattr("asyncdiff_pl.parallel.compiling.joinable_attentions", lambda denoiser: ())
        made = []
        monkeypatch.setattr(nn.functional, "linear", lambda *args: made.append(None) or linear(*args))  # noqa: B023
        denoiser, scheduler = build(name), ddim()
        handle = parallelize(denoiser, simulate=True, scheduler=scheduler, compile="blocks")
        found[kind] = Sampler(name)(denoiser, scheduler, 2), len(made)
        handle.remove()
    torch.testing.assert_close(found["joined"][0], found["apart"][0], rtol=1e-5, atol=1e-6)
    attentions = len(list(joinable_attentions(denoiser)))
    # two of three, in each of two steps
    assert found["apart"][1] - found["joined"][1] == 2 * 2 * attentions > 0


def test_equal_blocks_share_a_graph_still(graphs):
    denoiser, scheduler = one_level(transformer_layers_per_block=2), ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, compile="blocks")
    sampler = Sampler("sd21")
    sampler.latents, texts = sampler.latents.double(), sampler.kwargs["encoder_hidden_states"].double()
    sampler.kwargs = {"encoder_hidden_states": texts}
    sampler(denoiser, scheduler, 1)
    handle.remove()
    # 8 blocks of one width; the first of each transformer is given its tokens in another layout
    assert sum("scaled_dot_product_attention" in graph.code for graph in graphs) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_all_three(bias, graphs):
    attention = build_attention(bias=bias)
    expected = attention(TOKENS)
    compiled = prepared(attention)
    torch.testing.assert_close(compiled.wrap("", attention.forward)(TOKENS), expected, rtol=0, atol=1e-6)
    # and that of the result
    assert products(graphs) == 2
    # as it is, it computes them one by one
    assert torch.equal(attention(TOKENS), expected)


def test_tokens_and_what_they_see_may_differ(graphs):
    """A processor may have a self-attention look at something else."""
    attention = build_attention()
    other = TOKENS.flip(1) + 1
    expected = attention(TOKENS, encoder_hidden_states=other)
    compiled = prepared(attention)
    found = compiled.wrap("", attention.forward)(TOKENS, encoder_hidden_states=other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_removal_gives_weights_and_layers_back():
    attention, fresh = build_attention(bias=True), build_attention(bias=True)
    prepared(attention).remove()
    for name, weight in fresh.named_parameters():
        found = attention.get_parameter(name)
        assert torch.equal(found, weight)
        assert found.untyped_storage().nbytes() == weight.untyped_storage().nbytes()
    assert not any("forward" in vars(module) for module in attention.modules())


def test_changes_in_place_are_seen(graphs):
    """As LoRA weights are merged."""
    attention = build_attention()
    compiled = prepared(attention)
    call = compiled.wrap("", attention.forward)
    call(TOKENS)
    with torch.no_grad():
        attention.to_k.weight += 1
    torch.testing.assert_close(call(TOKENS), attention(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_another_weight_is_taken_over(name, graphs):
    attention = build_attention()
    compiled = prepared(attention)
    call = compiled.wrap("", attention.forward)
    call(TOKENS)
    layer = attention.get_submodule(name)
    layer.weight.data = layer.weight.data + 1
    compiled.look_again()
    found = call(TOKENS)
    torch.testing.assert_close(found, attention(TOKENS), rtol=0, atol=1e-6)
    # with the next inputs of a new kind they are joined again
    compiled.prepare(CPU)
    torch.testing.assert_close(call(TOKENS), found, rtol=0, atol=1e-6)
    compiled.remove()
    torch.testing.assert_close(attention(TOKENS), found, rtol=0, atol=1e-6)


class Quantised(nn.Linear):
    """Layers of a class of their own."""


@pytest.mark.parametrize("kind", ["class", "number format", "elsewhere", "one has a bias"])
def test_what_cannot_be_joined_stays(kind):
    attention, fresh = build_attention(), build_attention()
    for each in (attention, fresh):
        if kind == "class":
            each.to_k.__class__ = Quantised
        elif kind == "number format":
            each.to_k.weight.data = each.to_k.weight.data.double()
        elif kind == "elsewhere":
            # as the weights of another rank's stage
            each.to_k.weight.data = torch.ones(1, 1).expand(8, 8)
        else:
            each.to_k.bias = nn.Parameter(torch.ones(8), requires_grad=False)
    compiled = prepared(attention)
    for name, weight in fresh.named_parameters():
        assert attention.get_parameter(name).untyped_storage().nbytes() == weight.untyped_storage().nbytes()
    compiled.remove()
    assert not any("forward" in vars(module) for module in attention.modules())


def test_weights_that_were_taken_away_leave_no_memory_behind():
    """In a relay a rank keeps the weights of its stage."""
    attention = build_attention()
    compiled = prepared(attention)
    joined = compiled.projections[attention]
    assert joined.weight.untyped_storage().nbytes() == 3 * 8 * 8 * 4
    for name in NAMES:
        attention.get_submodule(name).weight.data = torch.full((1, 1), torch.nan).expand(8, 8)
    compiled.prepare(CPU)
    assert joined.weight is None
