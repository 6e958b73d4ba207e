"""What a recording reads, what it would freeze, and how a change is seen; graphs themselves are in tests/gpu."""

import time

import pytest
import torch
from denoisers import build, build_full
from fake_graph import FakeRecorder

from asyncdiff_pl.parallel.capture import CannotCapture, recorder_for
from asyncdiff_pl.parallel.fingerprint import fingerprint
from asyncdiff_pl.parallel.recorded_inputs import StaticInputs, frozen

CPU = torch.device("cpu")


def call(scale=1.0, shift=0.0, size=2, timestep=7):
    residuals = [torch.full((size,), shift), torch.full((size,), shift + 1)]
    return (torch.full((1, size), shift), torch.tensor(timestep)), {
        "residuals": residuals,
        "scale": scale,
        "flag": True,
        "none": None,
    }


def test_inputs_stay_where_they_are_and_take_what_is_given():
    inputs = StaticInputs(call(), CPU)
    (latents, timestep), kwargs = inputs.given
    inputs.load(call(shift=3.0, timestep=9))
    assert latents.tolist() == [[3.0, 3.0]]
    assert timestep.item() == 9
    assert [residual.tolist() for residual in kwargs["residuals"]] == [[3.0, 3.0], [4.0, 4.0]]
    assert (kwargs["scale"], kwargs["flag"], kwargs["none"]) == (1.0, True, None)


def test_a_network_may_take_entries_out_of_its_lists():
    inputs = StaticInputs(call(), CPU)
    inputs.given[1]["residuals"].clear()
    assert len(inputs.given[1]["residuals"]) == 2


@pytest.mark.parametrize("mode", [True, False])
def test_inputs_can_be_written_in_and_out_of_inference_mode(mode):
    with torch.inference_mode(mode):
        inputs = StaticInputs(call(), CPU)
    with torch.inference_mode(not mode):
        inputs.load(call(shift=2.0))
    assert inputs.given[0][0].tolist() == [[2.0, 2.0]]
    assert not inputs.given[0][0].is_inference()


def test_inputs_keep_the_memory_layout_but_not_the_sharing():
    one = torch.ones(1, 3, 4, 4).to(memory_format=torch.channels_last)
    same = torch.ones(1).expand(4)
    kept, spread = StaticInputs([one, same], CPU).given
    assert kept.stride() == one.stride()
    spread.copy_(torch.arange(4.0))
    assert spread.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (call(shift=5.0), True),
        (call(timestep=9), True),
        (call(timestep=9.0), False),
        (call(scale=0.5), False),
        # equal, but another kind of number
        (call(scale=1), False),
        (call(size=3), False),
        (([], call()), False),
    ],
)
def test_what_a_replay_would_freeze(other, is_same):
    assert (frozen(other) == frozen(call())) is is_same
    assert (hash(frozen(other)) == hash(frozen(call()))) is is_same


def test_an_argument_that_cannot_be_compared():
    with pytest.raises(CannotCapture, match="is given a set, which a graph would freeze"):
        frozen([torch.ones(1), {1, 2}])


@pytest.mark.parametrize(
    ("device", "backend", "why"),
    [
        ("cpu", None, "needs an NVIDIA GPU, and the denoiser is on cpu"),
        ("cuda", "gloo", "must go over nccl, and the process group's backend is gloo"),
    ],
)
def test_where_there_are_no_graphs(device, backend, why):
    with pytest.raises(CannotCapture, match=why):
        recorder_for(torch.device(device), backend)


# -- fingerprint ---------------------------------------------------------------------------------------------------


def attention(denoiser):
    return denoiser.mid_block.attentions[0].transformer_blocks[0].attn1


class OtherProcessor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = [1.0]


class PlainProcessor:
    def __init__(self):
        self.scale = 1.0


CHANGES = {
    "a weight that was replaced": lambda d: setattr(d.conv_in, "weight", torch.nn.Parameter(d.conv_in.weight.clone())),
    "half precision": lambda d: d.half(),
    "a memory layout": lambda d: d.conv_in.to(memory_format=torch.channels_last),
    "FreeU": lambda d: d.enable_freeu(0.9, 0.2, 1.5, 1.6),
    "a chunk size": lambda d: d.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1),
    "another processor": lambda d: attention(d).set_processor(PlainProcessor()),
    "a module more": lambda d: d.mid_block.add_module("adapter", torch.nn.Identity()),
    "a hook on a block": lambda d: d.mid_block.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_network(change):
    denoiser = build("sd15")
    before = fingerprint(denoiser)
    assert fingerprint(denoiser) == before
    CHANGES[change](denoiser)
    assert fingerprint(denoiser) != before


@pytest.mark.parametrize("processor", [PlainProcessor, OtherProcessor])
def test_scales_of_processors(processor):
    denoiser = build("sd15")
    attention(denoiser).set_processor(processor())
    found = set()
    for scale in (1.0, 0.5, 0.5):
        attention(denoiser).processor.scale = scale if processor is PlainProcessor else [scale]
        found.add(fingerprint(denoiser))
    assert len(found) == 2


def test_weights_changed_in_place_need_no_new_recording():
    denoiser = build("sd15")
    before = fingerprint(denoiser)
    denoiser.load_state_dict({name: value + 1 for name, value in denoiser.state_dict().items()})
    assert fingerprint(denoiser) == before


def test_a_large_network_is_looked_at_quickly():
    denoiser = build_full("sdxl")
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        fingerprint(denoiser)
        times.append(time.perf_counter() - begin)
    # once a sample of half a second; 3 ms on a core of its own
    assert min(times) < 0.03


# -- the stand-in for graphs ---------------------------------------------------------------------------------------


def test_recordings_freeze_numbers_and_branches_and_change_nothing_while_they_are_made():
    given, kept, scale = torch.ones(2), torch.zeros(2), 2.0

    def run():
        kept.add_(given)
        return given * scale if given.device.type == "cpu" and scale > 1 else given

    recording, result = FakeRecorder().record(run)
    assert kept.tolist() == [0, 0]
    scale = 0.5
    given.fill_(3)
    recording.replay()
    assert (result.tolist(), kept.tolist()) == ([6, 6], [3, 3])
