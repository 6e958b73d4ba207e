"""Patches with compiled blocks: the same numbers, whole graphs, and as many of them as there are kinds of blocks.

With a backend that runs graphs as they are, or as torch takes them apart for Inductor ("aot_eager"). The ranks:
test_ranks.py.
"""

import functools

import pytest
import torch
from denoisers import ddim
from patch_scenarios import double, one_level, tall
from torch._dynamo.utils import counters

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.patches.traffic import LocalSwap


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch compiles."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", keep)
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()


def sample(denoiser, sampler, samples=1, steps=3, **settings):
    """Latents of the last one of some samples in two patches."""
    scheduler = ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **{"patches": 2} | settings)
    try:
        return [sampler(denoiser, scheduler, steps) for _ in range(samples)][-1]
    finally:
        handle.remove()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@functools.cache
def expected(mode, portion):
    return sample(one_level(), tall("sd21", 6, torch.float64), mode=mode, portion=portion, warm_up=1)


@pytest.mark.parametrize("mode", ["full_sync", "corrected_async_gn", "no_sync"])
def test_compiled_blocks_compute_the_same(mode, graphs):
    portion = 1.0 if mode == "full_sync" else 0.5
    settings = {"mode": mode, "portion": portion, "warm_up": 1}
    found = sample(one_level(), tall("sd21", 6, torch.float64), compile="blocks", **settings)
    assert distance(found, expected(mode, portion)) < 1e-9
    assert graphs
    assert not counters["graph_break"]


def test_equal_blocks_share_a_graph_and_a_second_sample_compiles_nothing(graphs):
    denoiser, sampler = double("sdxl"), tall("sdxl", 8, torch.float64)
    found = sample(denoiser, sampler, steps=1, compile="blocks")
    assert distance(found, sample(denoiser, sampler, steps=1)) < 1e-9
    assert not counters["graph_break"]
    of_transformers = [graph for graph in graphs if "asyncdiff_pl.extend" in graph.code]
    # 27 blocks of two widths
    assert len(of_transformers) == 2
    kinds = len(graphs)
    again = sample(denoiser, sampler, samples=2, steps=1, compile="blocks")
    assert torch.equal(again, found)
    assert len(graphs) == kinds


def test_what_is_asked_of_other_patches_keeps_its_order(monkeypatch):
    """Keys and values do not depend on each other: nothing else would keep a compiler from changing their places."""
    names = {"compile": [], "none": []}
    post = LocalSwap.post
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    for kind, told in names.items():

        def watched(swap, parcels, what, told=told):
            told.append(what)
            return post(swap, parcels, what)

        monkeypatch.setattr(LocalSwap, "post", watched)
        sample(one_level(), tall("sd21", 6, torch.float64), steps=1, compile="blocks" if kind == "compile" else "none")
    assert names["compile"] == names["none"]
    torch._dynamo.reset()
