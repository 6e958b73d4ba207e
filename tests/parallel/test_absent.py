"""Tensors that are not here."""

import pytest
import torch

from asyncdiff_pl.parallel.stages.absent import Absent

CPU = torch.device("cpu")


def absent(*shape: int, dtype: torch.dtype = torch.float32) -> Absent:
    return Absent(torch.empty(shape, dtype=dtype, device="meta"), CPU)


@pytest.mark.parametrize(
    ("glue", "shape"),
    [
        (lambda x, y: x + y, (2, 4, 8, 8)),
        (lambda x, y: y * 2 + x, (2, 4, 8, 8)),
        (lambda x, y: torch.cat([x, y], 1), (2, 8, 8, 8)),
        (lambda x, y: torch.cat([y, x], 1), (2, 8, 8, 8)),
        (lambda x, y: x.permute(0, 2, 3, 1).reshape(2, 64, 4), (2, 64, 4)),
        (lambda x, y: x[:, :2].flatten(), (256,)),
        (lambda x, y: torch.nn.functional.interpolate(x, scale_factor=2.0), (2, 4, 16, 16)),
        (lambda x, y: torch.nn.functional.silu(x).chunk(2, 1)[1], (2, 2, 8, 8)),
        (lambda x, y: torch.fft.fftn(x, dim=(-2, -1)).real, (2, 4, 8, 8)),
        (lambda x, y: x.repeat_interleave(3, 0), (6, 4, 8, 8)),
        (lambda x, y: x.to(memory_format=torch.channels_last).contiguous(), (2, 4, 8, 8)),
    ],
)
def test_glue_over_an_absent_tensor_is_absent(glue, shape):
    result = glue(absent(2, 4, 8, 8), torch.ones(2, 4, 8, 8))
    assert isinstance(result, Absent)
    assert tuple(result.shape) == shape
    assert result.device == CPU


def test_number_formats():
    assert (absent(2, dtype=torch.float16) + torch.ones(2)).dtype == torch.float32
    assert absent(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert absent(2).half().dtype == torch.float16


def test_writing_into_an_absent_tensor_does_nothing():
    tensor = absent(2, 4)
    assert tensor.mul_(2) is tensor
    tensor[:, :2] = tensor[:, :2] * 3
    tensor += torch.ones(2, 4)
    assert tuple(tensor.shape) == (2, 4)


def test_writing_an_absent_tensor_into_one_that_is_here_is_an_error():
    with pytest.raises(AssertionError, match="would write an absent tensor"):
        torch.ones(2, 4).add_(absent(2, 4))


def test_it_costs_no_memory_and_says_what_it_is():
    tensor = absent(1 << 20, 1 << 20)
    assert (tensor + 1).shape == tensor.shape
    assert repr(tensor) == "Absent(shape=(1048576, 1048576), dtype=torch.float32, device=cpu)"


def test_in_inference_mode():
    with torch.inference_mode():
        assert tuple(torch.cat([absent(2, 4), torch.ones(2, 4)]).shape) == (4, 4)
