"""The guidance batch in halves: which arguments are split, and how."""

import pytest
import torch

from asyncdiff_pl.parallel.guidance import find_latents, join_halves, split_batch


def unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True):
    """Arguments of an image UNet."""


def video_unet(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):
    """Arguments of SVD's UNet."""


def controlled(
    sample,
    timestep,
    encoder_hidden_states,
    class_labels=None,
    cross_attention_kwargs=None,
    added_cond_kwargs=None,
    down_block_additional_residuals=None,
    mid_block_additional_residual=None,
    strange=None,
):
    """More arguments of an image UNet, and one that nobody knows."""


def transformer(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance):
    """Arguments of FLUX's transformer."""


def rows(*shape: int) -> torch.Tensor:
    """A tensor whose rows tell which they are."""
    return torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape).float()


TEXT, TIME = rows(2, 5, 8), torch.tensor(7)

# forward, arguments, argument to look at, rows that each half gets
SPLITS = [
    (unet, {}, "sample", [[0], [1]]),
    (unet, {"sample": rows(6, 4, 8, 8), "encoder_hidden_states": rows(6, 5, 8)}, "sample", [[0, 1, 2], [3, 4, 5]]),
    # AnimateDiff: text once for each frame
    (unet, {"encoder_hidden_states": rows(8, 5, 8)}, "encoder_hidden_states", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (unet, {"timestep": torch.tensor([3, 4])}, "timestep", [[3], [4]]),
    (unet, {"timestep": torch.tensor([9])}, "timestep", [[9], [9]]),
    (video_unet, {"added_time_ids": rows(2, 3)}, "added_time_ids", [[0], [1]]),
    (controlled, {"class_labels": torch.tensor([5, 6])}, "class_labels", [[5], [6]]),
    (controlled, {"mid_block_additional_residual": rows(2, 4, 1, 1)}, "mid_block_additional_residual", [[0], [1]]),
]


def call(forward, more):
    arguments = {"sample": rows(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": TEXT, **more}
    return (arguments.pop("sample"), arguments.pop("timestep")), arguments


def argument(forward, args, kwargs, name):
    names = forward.__code__.co_varnames
    return kwargs[name] if name in kwargs else args[names.index(name)]


@pytest.mark.parametrize(("forward", "more", "name", "expected"), SPLITS)
def test_split(forward, more, name, expected):
    args, kwargs = call(forward, more)
    for half in range(2):
        split = split_batch(forward, args, kwargs, half)
        found = argument(forward, *split, name)
        assert found.flatten(1)[:, 0].tolist() == expected[half] if found.ndim > 1 else found.tolist() == expected[half]


@pytest.mark.parametrize("timestep", [7, 0.5, torch.tensor(7), torch.tensor(0.5)])
def test_one_timestep_is_shared(timestep):
    args, kwargs = call(unet, {"timestep": timestep})
    for half in range(2):
        assert argument(unet, *split_batch(unet, args, kwargs, half), "timestep") == timestep


def test_nested_arguments():
    """IP-Adapter's list of image embeddings, ControlNet's residuals; what is no tensor stays as it is."""
    args, kwargs = call(controlled, {})
    kwargs["added_cond_kwargs"] = {"image_embeds": [rows(2, 1, 8), rows(4, 8)], "scale": 0.5}
    kwargs["down_block_additional_residuals"] = (rows(2, 4, 8, 8), rows(2, 4, 4, 4))
    kwargs["cross_attention_kwargs"] = {"ip_adapter_masks": [rows(1, 3, 8, 8)], "scale": 0.7}
    split = split_batch(controlled, args, kwargs, 1)
    added = argument(controlled, *split, "added_cond_kwargs")
    assert [embeds[..., 0].flatten().tolist() for embeds in added["image_embeds"]] == [[1], [2, 3]]
    assert added["scale"] == 0.5
    residuals = argument(controlled, *split, "down_block_additional_residuals")
    assert isinstance(residuals, tuple)
    assert [tuple(residual.shape) for residual in residuals] == [(1, 4, 8, 8), (1, 4, 4, 4)]
    assert argument(controlled, *split, "cross_attention_kwargs") == kwargs["cross_attention_kwargs"]


@pytest.mark.parametrize(("half", "expected"), [(0, [0, 1]), (1, [2, 3])])
def test_attention_arguments(half, expected):
    """SD3's and FLUX's IP-Adapters and GLIGEN hide their part of the batch in them."""
    given = {"ip_adapter_image_embeds": [rows(4, 1, 8)], "gligen": {"boxes": rows(4, 3, 4)}, "scale": 0.7}
    args, kwargs = call(
        controlled,
        {"sample": rows(4, 4, 8, 8), "encoder_hidden_states": rows(4, 5, 8), "cross_attention_kwargs": given},
    )
    found = argument(controlled, *split_batch(controlled, args, kwargs, half), "cross_attention_kwargs")
    assert found["ip_adapter_image_embeds"][0][:, 0, 0].tolist() == expected
    assert found["gligen"]["boxes"][:, 0, 0].tolist() == expected
    assert found["scale"] == 0.7


def test_position_tables_are_never_split():
    args = (rows(2, 16, 4), rows(2, 5, 8), rows(2, 8), torch.tensor([3.0, 3.0]), rows(16, 3), rows(2, 3), rows(2))
    first = split_batch(transformer, args, {}, 0)[0]
    assert [tensor.shape[0] for tensor in first] == [1, 1, 1, 1, 16, 2, 1]


def test_the_callers_arguments_stay_whole():
    args, kwargs = call(unet, {"added_cond_kwargs": {"text_embeds": rows(2, 8)}})
    split_batch(unet, args, kwargs, 0)
    assert args[0].shape[0] == kwargs["added_cond_kwargs"]["text_embeds"].shape[0] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample": rows(3, 4, 8, 8)}, "called with a batch of 3: turn guidance on .* with cfg 1"),
        ({"sample": rows(1, 4, 8, 8)}, "called with a batch of 1"),
        ({"strange": rows(2, 4)}, "does not know whether the denoiser's argument 'strange' holds the guidance batch"),
        ({"strange": [rows(2, 4)]}, "argument 'strange'"),
        ({"cross_attention_kwargs": {"odd": rows(2, 4)}}, "argument 'odd'"),
        ({"encoder_hidden_states": rows(3, 5, 8)}, r"cannot halve a tensor of shape \(3, 5, 8\) along a batch of 2"),
    ],
)
def test_what_cannot_be_halved_is_an_error(more, message):
    args, kwargs = call(controlled, more)
    with pytest.raises(ValueError, match=message):
        split_batch(controlled, args, kwargs, 0)


def test_latents_are_the_first_argument_however_given():
    sample = rows(2, 4, 8, 8)
    assert find_latents(unet, (sample, TIME), {"encoder_hidden_states": TEXT}) is sample
    assert find_latents(unet, (), {"timestep": TIME, "sample": sample, "encoder_hidden_states": TEXT}) is sample


def test_halves_are_joined_in_order():
    whole = [rows(4, 2), rows(2, 3)]
    halves = [[tensor.chunk(2)[half] for tensor in whole] for half in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(join_halves(halves), whole, strict=True))
    assert join_halves([whole]) is whole
