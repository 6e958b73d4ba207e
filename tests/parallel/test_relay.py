"""Exact steps from stage to stage: the order of messages, what a rank reads, and the weights it holds.

That the ranks compute what one computes is tested on ranks (test_ranks.py).
"""

import functools

import pytest
import torch
from denoisers import Sampler, build, ddim
from diffusers import UNet2DConditionModel

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.fingerprint import fingerprint
from asyncdiff_pl.parallel.stages.placement import Placement
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.stages.relay import RelayWorker, check_formats, relay_order
from asyncdiff_pl.parallel.stages.units import meta_twin, split_modules
from asyncdiff_pl.parallel.stages.worker import Worker
from asyncdiff_pl.parallel.weights import device_of_rank

CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 3)


@functools.cache
def program(stages: int, size: int = 8, cut: tuple | None = None, name: str = "sd21") -> Program:
    denoiser, sampler = build(name), Sampler(name, size=size)
    inputs = (sampler.call(sampler.latents), torch.tensor(3)), sampler.kwargs
    return Program.make(meta_twin(denoiser), denoiser.forward, Layout(stages), cut, *inputs)


def place(denoiser, stage, device=CPU, stages=3):
    placement = Placement(denoiser, split_modules(denoiser)[1], device)
    placement.place(program(stages), stage)
    return placement


def held(denoiser):
    """Names of the weights that are there whole."""
    weights = denoiser.named_parameters()
    return {name for name, weight in weights if weight.untyped_storage().nbytes() >= weight.nbytes}


def owned(denoiser, stage, stages=3):
    """Names of the weights of a stage's units."""
    cut = program(stages).cut[stage]
    return {name for name, _ in denoiser.named_parameters() if name.startswith(tuple(f"{part}." for part in cut))}


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "svd"])
def test_all_that_a_stage_sends_comes_after_what_it_was_made_from(name):
    """Else a rank would wait for a message that it has not posted yet."""
    found = program(3, name=name)
    graph, owner = found.graph, found.boundary.owner
    order = [message.value for message in relay_order(found.messages)]
    assert sorted(order) == sorted(message.value for message in found.messages)
    for value in graph.values:
        if value.index not in order:
            continue
        needs = (graph.units[value.unit].inputs | value.sources) & set(order)
        foreign = {need for need in needs if owner[graph.values[need].unit] != owner[value.unit]}
        assert all(order.index(need) < order.index(value.index) for need in foreign)


class Late:
    """A message that is written into its buffer when it is waited for."""

    def __init__(self, buffer, number):
        self.buffer, self.number = buffer, number

    def wait(self):
        self.buffer.fill_(self.number)


@pytest.mark.parametrize("is_last", [False, True])
def test_a_rank_reads_what_was_made_in_this_step(is_last):
    worker = Worker(0, 0, [4, 7])
    worker.prepare({4: torch.empty(3, device=META), 7: torch.empty(2, device=META)}, CPU)
    for number in (1.0, 2.0):
        relay = RelayWorker(worker, is_last)
        for value in (4, 7):
            relay.expect(value, Late(relay.incoming(value), number))
        read = relay.read(4)
        assert torch.equal(read, torch.full((3,), number))
        # FreeU
        read.mul_(9)
        relay.finish()
    # what an asynchronous step would read next
    assert torch.equal(worker.read(7), torch.full((2,), 2.0))
    assert torch.equal(worker.read(4), torch.full((3,), 2.0 if is_last else 18.0))


def test_autocast_is_an_error():
    check_formats(CPU)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="take warm_up_mode replicated"):
        check_formats(CPU)


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(3))
def test_a_rank_holds_its_own_stage_and_what_belongs_to_none(stage):
    denoiser = build("sd21")
    units = owned(denoiser, 0) | owned(denoiser, 1) | owned(denoiser, 2)
    everything = {name for name, _ in denoiser.named_parameters()}
    place(denoiser, stage)
    assert held(denoiser) == everything - units | owned(denoiser, stage) < everything
    weights = dict(denoiser.named_parameters())
    assert all(weights[name].isnan().all() for name in everything - held(denoiser))


@pytest.mark.parametrize(
    ("backends", "device"), [("cpu:gloo,cuda:gloo", CPU), ("cuda:nccl", GPU), ("cpu:gloo,cuda:nccl", GPU)]
)
def test_where_a_rank_computes(backends, device, monkeypatch):
    """On its GPU, even if the denoiser has not been brought there."""
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: backends)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert device_of_rank(build("sd21")) == device


def test_another_resolution_moves_no_weight():
    denoiser = build("sd21")
    placement = place(denoiser, 1)
    before = {name: weight.data_ptr() for name, weight in denoiser.named_parameters()}
    assert program(3, size=16).cut != program(3).cut
    placement.place(program(3, size=16, cut=tuple(map(tuple, program(3).cut))), 1)
    assert {name: weight.data_ptr() for name, weight in denoiser.named_parameters()} == before


def test_what_asks_for_weights_is_answered():
    denoiser = build("sd21")
    shapes = [(name, weight.shape, weight.dtype, weight.device) for name, weight in denoiser.named_parameters()]
    answers = denoiser.device, denoiser.dtype, denoiser.num_parameters()
    before = fingerprint(denoiser)
    place(denoiser, 1)
    assert [(name, weight.shape, weight.dtype, weight.device) for name, weight in denoiser.named_parameters()] == shapes
    assert (denoiser.device, denoiser.dtype, denoiser.num_parameters()) == answers
    assert fingerprint(denoiser) == fingerprint(denoiser) != before
    # as when the whole pipeline is brought to where it computes
    there = held(denoiser)
    assert held(denoiser.to("cpu")) == there


def test_saved_weights_are_the_weights(tmp_path):
    denoiser, fresh = build("sd21"), build("sd21")
    place(denoiser, 0)
    denoiser.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    for name, weight in fresh.state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_removal_gives_all_weights_back():
    denoiser, fresh = build("sd21"), build("sd21")
    place(denoiser, 2).remove()
    assert held(denoiser) == {name for name, _ in fresh.named_parameters()}
    assert torch.equal(Sampler("sd21")(denoiser, ddim(), 2), Sampler("sd21")(fresh, ddim(), 2))
    assert not denoiser._state_dict_hooks
