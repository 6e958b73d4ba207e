import pytest
import torch

from asyncdiff_pl.metrics.psnr import psnr


@pytest.mark.parametrize(
    ("error", "data_range", "expected"),
    [(0.1, 1.0, 20.0), (0.01, 1.0, 40.0), (0.1, 2.0, 26.0206), (1.0, 1.0, 0.0), (0.0, 1.0, float("inf"))],
)
def test_an_even_error(error, data_range, expected):
    reference = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    found = psnr(reference + error, reference, data_range)
    assert found.tolist() == pytest.approx([expected] * 2, abs=1e-3)


def test_each_sample_has_its_own_over_all_of_its_frames():
    reference = torch.zeros(2, 2, 3, 8, 8)
    pictures = reference.clone()
    pictures[0] += 0.1
    pictures[1, 0] += 0.1  # half of this clip is exact
    assert psnr(pictures.half(), reference.half()).tolist() == pytest.approx([20.0, 23.0103], abs=1e-2)


@pytest.mark.parametrize(("first", "second"), [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((2,), (2,))])
def test_shapes_that_do_not_fit(first, second):
    with pytest.raises(ValueError, match=r"of one shape; given are \("):
        psnr(torch.zeros(first), torch.zeros(second))
