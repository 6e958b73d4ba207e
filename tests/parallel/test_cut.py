"""Cuts: given, named and found."""

import functools
import itertools

import pytest
import torch
from denoisers import Sampler, build

from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import TOLERANCE, cut_hash, cut_names, find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.units import Graph, meta_twin, trace


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of("sdxl")


@functools.cache
def graph_of(name: str) -> Graph:
    sampler = Sampler(name)
    latents = sampler.call(sampler.latents)
    return trace(meta_twin(build(name)), (latents, torch.tensor(7)), sampler.kwargs, latents)


DOWN = ["conv_in", "down_blocks"]
UP = ["mid_block", "up_blocks", "conv_norm_out", "conv_out"]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ([[*DOWN, "encoder"], UP], "names 'encoder' in stage 0, but no unit of the denoiser has that name"),
        ([DOWN, ["time_embedding", *UP]], "names 'time_embedding' in stage 1, but no unit"),
        ([DOWN, [*UP, "down_block"]], "names 'down_block' in stage 1, but no unit"),
        ([DOWN, [*UP, "down_blocks.1"]], "gives 'down_blocks.1.resnets.0' to both stage 0 and 1"),
        ([[*DOWN, "conv_in"], UP], "gives 'conv_in' to both stage 0 and 0"),
        ([DOWN, UP[:-1]], "leaves out 1 units, 'conv_out' for one; give each to a stage"),
        ([["conv_in"], UP], "leaves out .* units, 'down_blocks.0.resnets.0' for one"),
        ([[*DOWN, *UP], []], "Stage 1 of the cut is empty"),
    ],
)
def test_bad_cuts_are_errors(graph, cut, message):
    with pytest.raises(ValueError, match=message):
        resolve_cut(graph, cut)


def test_a_name_covers_all_below_it(graph):
    owner = resolve_cut(graph, [DOWN, UP])
    expected = [0 if unit.name.startswith(("conv_in", "down")) else 1 for unit in graph.units]
    assert owner == expected


@pytest.mark.parametrize("stages", range(1, 9))
def test_names_give_the_same_cut_back(graph, stages):
    owner = find_cut(graph, stages)
    names = cut_names(graph, owner)
    assert resolve_cut(graph, names) == owner
    assert sum(map(len, names)) <= len(graph.units)


def test_names_are_as_short_as_they_can_be(graph):
    names = cut_names(graph, resolve_cut(graph, [DOWN, UP]))
    assert names[0] == ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2"]


def test_hash_is_stable_and_tells_cuts_apart(graph):
    assert cut_hash([["a", "b"], ["c"]]) == "a63090699e74"
    assert len({cut_hash([["a", "b"], ["c"]]), cut_hash([["a"], ["b", "c"]]), cut_hash([["a,b"], ["c", ""]])}) == 3
    assert len({cut_hash(cut_names(graph, find_cut(graph, stages))) for stages in range(2, 9)}) == 7


def test_as_many_stages_as_units_but_not_more():
    graph = graph_of("sd21")
    assert sorted(find_cut(graph, len(graph.units))) == list(range(len(graph.units)))
    with pytest.raises(ValueError, match=f"{len(graph.units) + 1} stages are more than .* {len(graph.units)} units"):
        find_cut(graph, len(graph.units) + 1)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("name", "stages"), [("sd21", 2), ("sd21", 3), ("animatediff", 2), ("sdxl", 2)])
def test_no_contiguous_or_folded_cut_is_better(name, stages, folded):
    """All cuts tried one after another: the slowest share first, then the bytes."""
    graph = graph_of(name)
    flops = [unit.flops for unit in graph.units]
    size, tried = len(flops), []
    for bounds in itertools.combinations(range(size), stages):
        if bounds[0] and not folded:
            break
        owner = [stages - 1] * size
        for stage, (start, end) in enumerate(itertools.pairwise(bounds)):
            owner[start:end] = [stage] * (end - start)
        tried.append((slowest(flops, owner), owner))
    limit = min(cost for cost, _ in tried) * (1 + TOLERANCE)
    least = min(stale_bytes(graph, owner) for cost, owner in tried if cost <= limit)
    found = find_cut(graph, stages, folded=folded)
    assert slowest(flops, found) <= limit
    assert stale_bytes(graph, found) == least
    # only the last stage may begin again
    changes = sum(a != b for a, b in itertools.pairwise(found))
    assert changes == stages - 1 + (folded and found[0] == stages - 1)


def slowest(flops: list[int], owner: list[int]) -> int:
    return max(sum(f for f, o in zip(flops, owner, strict=True) if o == stage) for stage in set(owner))


def stale_bytes(graph: Graph, owner: list[int]) -> int:
    return bytes_per_step(graph, find_boundary(graph, owner))
