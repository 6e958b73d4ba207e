"""Patches with compiled blocks: the same numbers, whole graphs, and as many of them as there are kinds of blocks.

With a backend that runs graphs as they are, or as torch takes them apart for Inductor ("aot_eager"). The ranks:
test_ranks.py.
"""

import torch
from denoisers import ddim, one_level
from patch_scenarios import tall
from torch._dynamo.utils import counters

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.patches.swap import LocalSwap


def sample(denoiser, sampler, samples=1, steps=3, **settings):
    """Latents of the last one of some samples in two patches, or another number."""
    scheduler = ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **{"patches": 2} | settings)
    try:
        return [sampler(denoiser, scheduler, steps) for _ in range(samples)][-1]
    finally:
        handle.remove()


def test_compiled_blocks_compute_the_same(graphs):
    denoiser, sampler = one_level(), tall("sd21", 6, torch.float64)
    settings = {"patches": 3, "mode": "corrected_async_gn", "portion": 0.5, "warm_up": 1}
    expected = sample(denoiser, sampler, **settings)
    found = sample(denoiser, sampler, compile="blocks", **settings)
    assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert graphs
    assert not counters["graph_break"]


def test_equal_blocks_share_a_graph_and_a_second_sample_compiles_nothing(graphs):
    denoiser, sampler = one_level(transformer_layers_per_block=3), tall("sd21", 6, torch.float64)
    found = sample(denoiser, sampler, steps=1, compile="blocks")
    # 12 blocks of one width; the first of each transformer is given its tokens in another layout
    assert sum("asyncdiff_pl.extend" in graph.code for graph in graphs) == 2
    kinds = len(graphs)
    again = sample(denoiser, sampler, samples=2, steps=1, compile="blocks")
    assert torch.equal(again, found)
    assert len(graphs) == kinds


def test_a_norm_and_its_convolution_ask_once_and_all_ask_in_order(monkeypatch):
    told = {"none": [], "blocks": []}
    post = LocalSwap.post
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    for kind, names in told.items():

        def watched(swap, parcels, what, is_waited_for, names=names):
            names.append(what)
            return post(swap, parcels, what, is_waited_for)

        monkeypatch.setattr(LocalSwap, "post", watched)
        sample(one_level(), tall("sd21", 6, torch.float64), steps=1, compile=kind)
    torch._dynamo.reset()
    assert told["blocks"] == told["none"]
    assert sum(name.endswith(("norm1", "norm2")) for name in told["none"]) == 10
    assert not [name for name in told["none"] if name.endswith(("conv1", "conv2"))]
