"""Encoders that are run by one rank each, over gloo."""

import pytest
import torch
from checkpoints import save_small_sdxl
from diffusers import DiffusionPipeline
from PIL import Image
from ranks import run_ranks
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.parallel import Groups, Layout, parallelize
from asyncdiff_pl.parallel.encoders import encoders_of, share_out
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.sending import from_rank

CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (64, 64), (90, 160, 30))


@pytest.fixture(scope="module")
def small_sdxl(tmp_path_factory):
    return str(save_small_sdxl(tmp_path_factory.mktemp("small_sdxl")))


# -- who runs what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "owners"),
    [
        ({"text_encoder": 5}, 1, {"text_encoder": 0}),
        ({"text_encoder": 5}, 3, {"text_encoder": 2}),
        ({"a": 2, "b": 14, "vae.encoder": 0}, 2, {"b": 1, "a": 0, "vae.encoder": 0}),
        ({"a": 3, "b": 4, "c": 5, "d": 6}, 2, {"d": 1, "c": 0, "b": 0, "a": 1}),
        ({"a": 1, "b": 1, "c": 1}, 2, {"a": 1, "b": 0, "c": 1}),
    ],
)
def test_ranks_hold_about_equally_much(sizes, num_ranks, owners):
    assert share_out(sizes, num_ranks) == owners


def test_what_has_no_encoder_is_left_alone(small_svd):
    assert [*encoders_of(load(small_svd))] == ["image_encoder"]
    assert encoders_of(nn.Linear(2, 2)) == {}


# -- ranks ---------------------------------------------------------------------------------------------------------


def load(folder):
    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    """A picture, or a video."""
    is_video = hasattr(pipe, "image_encoder") and not hasattr(pipe, "text_encoder")
    settings = {"image": PICTURE, "num_frames": 2} if is_video else {"prompt": "a red ball", "negative_prompt": "blue"}
    size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    return pipe(**settings, **size, generator=torch.Generator().manual_seed(3))[0]


def count_calls(pipe):
    """How often each encoder is run in this process, by name."""
    counts = {}
    for name, encoder in {**encoders_of(pipe), "vae.encoder": pipe.vae.encoder}.items():
        counts[name] = 0

        def counted(module, args, name=name):
            counts[name] += 1

        # a part that is run once: the module itself is called on all ranks
        [*encoder.children()][-1].register_forward_pre_hook(counted)
    return counts


def is_held(encoder):
    return all(weight.untyped_storage().nbytes() >= weight.nbytes for weight in encoder.parameters())


def play(rank, folder, expected, own, calls):
    pipe = load(folder)
    weights = {name: encoder.state_dict() for name, encoder in encoders_of(pipe).items()}
    forms = {name: (encoder.dtype, encoder.device) for name, encoder in encoders_of(pipe).items()}
    counts = count_calls(pipe)
    handle = parallelize(pipe, stages=2, share_encoding=True)
    assert {name for name, encoder in encoders_of(pipe).items() if is_held(encoder)} == own[rank]
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
    assert counts == {name: 2 * calls[rank].get(name, 0) for name in counts}
    for name, encoder in encoders_of(pipe).items():
        assert (encoder.dtype, encoder.device) == forms[name]
        # as they would be saved
        assert all(torch.equal(encoder.state_dict()[key], weight) for key, weight in weights[name].items())
        if name not in own[rank]:
            with pytest.raises(ValueError, match=r"\(LayerNorm\) was called by itself"):
                next(part for part in encoder.modules() if isinstance(part, nn.LayerNorm))(torch.ones(1, 32))
    handle.remove()
    assert all(is_held(encoder) for encoder in encoders_of(pipe).values())
    if rank == 0:
        assert torch.equal(draw(pipe), expected)
        assert all(counts[name] for name in encoders_of(pipe))


def play_forms(rank):
    """Values as encoders give them, and odd ones."""
    exchange = Exchange(Groups.build(Layout(stages=2).over(2)))
    states = tuple(torch.randn(2, 3, generator=torch.Generator().manual_seed(at)) for at in range(2))
    value = {
        "output": BaseModelOutput(last_hidden_state=states[1], hidden_states=states),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "channels last": torch.arange(48).view(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "slice": torch.arange(12).view(3, 4)[:, 1],
        "expanded": torch.ones(1, 1).expand(2, 5),
        "half": torch.tensor([0.1, -0.0, float("inf")], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "text": ["a", None, 7],
    }
    found = from_rank(exchange, value if rank == 1 else None, 1, rank, CPU)
    assert (found is value) == (rank == 1)
    output = found.pop("output")
    assert type(output) is BaseModelOutput
    assert output[0] is output.hidden_states[1]
    assert all(map(torch.equal, output.hidden_states, states))
    assert found["text"] == value["text"]
    for name in found.keys() - {"text"}:
        assert torch.equal(found[name], value[name]), name
        assert found[name].dtype == value[name].dtype
    for name in ("turned", "channels last"):
        assert found[name].stride() == value[name].stride()


def play_all(rank, sdxl, svd, expected):
    play_forms(rank)
    # the second text encoder is the larger one; each runs for the prompt and for the negative prompt
    own = [{"text_encoder"}, {"text_encoder_2"}]
    play(rank, sdxl, expected[0], own, [{"text_encoder": 2}, {"text_encoder_2": 2}])
    play(rank, svd, expected[1], [set(), {"image_encoder"}], [{"vae.encoder": 1}, {"image_encoder": 1}])


def test_each_encoder_is_run_and_held_by_one_rank(small_sdxl, small_svd):
    expected = [draw(load(folder)) for folder in (small_sdxl, small_svd)]
    run_ranks(2, play_all, small_sdxl, small_svd, expected)
