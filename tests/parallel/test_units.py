"""Units, values and boundary tensors, on the tiny denoisers and at full size on the meta device."""

import functools
import json

import diffusers
import pytest
import torch
from cuts import ORIGINAL
from denoisers import NAMES, Sampler, build, build_full, full_call
from torch import nn

from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.parallel.stages.boundary import bytes_per_step, find_boundary
from asyncdiff_pl.parallel.stages.cut import find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.units import Graph, meta_twin, trace


@functools.cache
def tiny_graph(name: str) -> Graph:
    sampler = Sampler(name)
    latents = sampler.call(sampler.latents)
    return trace(meta_twin(build(name)), (latents, torch.tensor(7)), sampler.kwargs, latents)


@functools.cache
def full_graph(name: str) -> Graph:
    args, kwargs = full_call(name)
    return trace(build_full(name), args, kwargs, args[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_lies_in_one_unit_or_sees_no_latents(name):
    parameters = [parameter for parameter, _ in build(name).named_parameters()]
    units = [unit.name for unit in tiny_graph(name).units]
    outside = set()
    for parameter in parameters:
        owners = [unit for unit in units if parameter.startswith(unit + ".")]
        assert len(owners) < 2
        if not owners:
            outside.add(parameter.split(".")[0])
    assert outside == {"time_embedding"} | ({"add_embedding"} if name in ("sdxl", "svd") else set())


@pytest.mark.parametrize("name", NAMES)
def test_units_are_in_order_of_execution_and_need_earlier_values(name):
    denoiser, sampler, called = build(name), Sampler(name), []
    graph = tiny_graph(name)
    for unit in graph.units:
        module = denoiser.get_submodule(unit.name)
        module.register_forward_hook(lambda *_, name=unit.name: called.append(name))
    denoiser(sampler.call(sampler.latents), torch.tensor(7), **sampler.kwargs)
    assert called == [unit.name for unit in graph.units]
    for number, unit in enumerate(graph.units):
        assert unit.flops >= 0
        assert unit.inputs, f"{unit.name} needs nothing"
        assert all(graph.values[value].unit < number for value in unit.inputs if value >= 0)
    assert [value.index for value in graph.values] == list(range(len(graph.values)))


def test_sdxl_attention_is_cut_between_transformer_blocks():
    names = [unit.name for unit in full_graph("sdxl").units]
    attention = "up_blocks.0.attentions.1"
    blocks = [f"{attention}.transformer_blocks.{i}" for i in range(10)]
    expected = [f"{attention}.norm", f"{attention}.proj_in", *blocks, f"{attention}.proj_out"]
    assert [name for name in names if name.startswith(attention)] == expected


def test_attention_with_one_block_is_a_unit():
    names = [unit.name for unit in full_graph("sd15").units]
    assert [name for name in names if "attentions.0" in name and name.startswith("down_blocks.0")] == [
        "down_blocks.0.attentions.0"
    ]


def test_motion_modules_are_units():
    names = {unit.name for unit in full_graph("animatediff").units}
    assert {"down_blocks.0.motion_modules.1", "up_blocks.3.motion_modules.2"} <= names


# what other ranks really consume of the original's cuts, in MiB a step: measured at the original code
CONSUMED = {
    "sd15": (23, 28, 34),
    "sd21": (51, 80, 72),
    "sdxl": (7.5, 35, 68),
    "svd": (1477, 1951, 1898),
    "animatediff": (420, 565),
}


@pytest.mark.parametrize(
    ("name", "stages", "mib"),
    [(name, at + 2, mib) for name, sizes in CONSUMED.items() for at, mib in enumerate(sizes)],
)
def test_full_size_cuts(name, stages, mib):
    """With the original's cut no more travels than is consumed; a found cut is at least as even."""
    graph = full_graph(name)
    original, *found = resolve_cut(graph, ORIGINAL[name, stages]), find_cut(graph, stages), fold(graph, stages)
    assert bytes_per_step(graph, find_boundary(graph, original)) / 2**20 <= 1.05 * mib
    assert all(slowest_share(graph, each) <= slowest_share(graph, original) for each in found)


def fold(graph: Graph, stages: int) -> list[int]:
    return find_cut(graph, stages, folded=True)


def test_a_folded_cut_of_sdxl_in_two_sends_little():
    graph = full_graph("sdxl")
    sizes = [bytes_per_step(graph, find_boundary(graph, cut)) / 2**20 for cut in (fold(graph, 2), find_cut(graph, 2))]
    assert sizes[0] < 20 < sizes[1]


@pytest.mark.parametrize("name", NAMES)
def test_up_to_eight_stages_are_found(name):
    graph = full_graph(name)
    for stages in range(2, 9):
        owner = find_cut(graph, stages)
        assert sorted(set(owner)) == list(range(stages))
        assert slowest_share(graph, owner) < 1.3 / stages


def slowest_share(graph: Graph, owner: list[int]) -> float:
    shares = [0] * (max(owner) + 1)
    for unit, stage in zip(graph.units, owner, strict=True):
        shares[stage] += unit.flops
    return max(shares) / sum(shares)


def full_transformer(kind: str, folder: str, **inputs: tuple[int, ...]) -> Graph:
    """A published checkpoint's transformer on the meta device."""
    config = json.loads((MODELS_FOLDER / folder / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        transformer = getattr(diffusers, kind).from_config(config).half().eval()
        given = {name: torch.empty(shape, dtype=torch.float16) for name, shape in inputs.items()}
        if "class_labels" in given:
            given["class_labels"] = given["class_labels"].long()
        return trace(transformer, (), given, given["hidden_states"])


FULL_TRANSFORMERS = {
    "sd3": functools.partial(
        full_transformer,
        "SD3Transformer2DModel",
        "sd3-medium",
        hidden_states=(2, 16, 128, 128),
        encoder_hidden_states=(2, 333, 4096),
        pooled_projections=(2, 2048),
        timestep=(2,),
    ),
    "flux": functools.partial(
        full_transformer,
        "FluxTransformer2DModel",
        "flux-dev",
        hidden_states=(1, 4096, 64),
        encoder_hidden_states=(1, 512, 4096),
        pooled_projections=(1, 768),
        timestep=(1,),
        guidance=(1,),
        img_ids=(4096, 3),
        txt_ids=(512, 3),
    ),
    "dit": functools.partial(
        full_transformer,
        "DiTTransformer2DModel",
        "dit-xl-2-256",
        hidden_states=(2, 4, 32, 32),
        timestep=(2,),
        class_labels=(2,),
    ),
}


@pytest.mark.parametrize(("name", "blocks"), [("sd3", 24), ("flux", 19 + 38), ("dit", 28)])
def test_full_transformers_are_cut_between_any_two_blocks(name, blocks):
    graph = FULL_TRANSFORMERS[name]()
    assert sum("transformer_blocks." in unit.name for unit in graph.units) == blocks
    for stages in range(2, 9):
        owner = find_cut(graph, stages)
        assert sorted(set(owner)) == list(range(stages))
        assert slowest_share(graph, owner) < 1.3 / stages


class Twice(nn.Module):
    """Calls its first block twice, with another between; both outputs of it are needed at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, sample, timestep=None):
        first = self.blocks[0](sample)
        second = self.blocks[1](first)
        return self.blocks[2](first + second + self.blocks[0](second))


def test_messages_are_expected_in_the_order_in_which_a_stage_makes_them():
    sample = torch.zeros(2, 4)
    graph = trace(meta_twin(Twice()), (sample,), {}, sample)
    boundary = find_boundary(graph, [0, 0, 1])
    assert list(boundary.order) == [0, 1, 2]
    assert [graph.values[value].unit for value in boundary.order] == [0, 1, 0]


def test_a_network_without_parts_that_see_the_latents_is_an_error():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.embedding(timestep)

    sample = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="No part of Blind works on the latents"):
        trace(meta_twin(Blind()), (sample, sample.clone()), {}, sample)


def test_a_twin_holds_no_data_and_no_hooks():
    denoiser = build("sd21")
    denoiser.register_forward_hook(lambda *_: pytest.fail("the twin kept a hook"))
    twin = meta_twin(denoiser)
    sampler = Sampler("sd21")
    assert {tensor.device.type for tensor in [*twin.parameters(), *twin.buffers()]} == {"meta"}
    args = sampler.call(sampler.latents).to("meta"), torch.tensor(7, device="meta")
    twin(*args, encoder_hidden_states=sampler.kwargs["encoder_hidden_states"].to("meta"))
