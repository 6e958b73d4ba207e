import pytest
import torch
from PIL import Image
from torch import nn

from asyncdiff_pl.metrics import precision_recall as module
from asyncdiff_pl.metrics.precision_recall import PrecisionRecall, precision_recall


class Colours(nn.Module):
    """The mean of each colour."""

    def forward(self, pictures):
        return pictures.double().mean((2, 3))


def test_a_table_worked_out_by_hand(monkeypatch):
    # k = 1: real balls reach 1 about 0 and 1, 3 about 4; generated ones 0.5 about 0.5 and 1, 8 about 9
    real = torch.tensor([[0.0], [1.0], [4.0]])
    generated = torch.tensor([[0.5], [1.0], [9.0]])
    # 0.5 and 1 are among the real ones, 9 is not (4 reaches to 7); all real ones but none are in a generated ball:
    # 0 in 0.5's (its edge counts), 1 in its own, 4 in 9's
    assert precision_recall(real, generated, neighbours=1) == pytest.approx((2 / 3, 1.0))
    # k = 2: real balls reach 4, 3 and 4, generated ones 8.5, 8 and 8.5
    assert precision_recall(real, generated, neighbours=2) == pytest.approx((2 / 3, 1.0))
    # row by row it is the same
    monkeypatch.setattr(module, "ENTRIES", 1)
    assert precision_recall(real, generated, neighbours=1) == pytest.approx((2 / 3, 1.0))


def test_a_part_of_the_real_ones_is_precise_and_far_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 8, generator=generator)
    assert precision_recall(real, real) == (1.0, 1.0)
    found = precision_recall(real, real[:20] + 1e-3)
    assert found.precision == 1.0
    assert found.recall < 0.9
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    few_modes = torch.cat([torch.randn(100, 8, generator=generator), 50 + torch.randn(100, 8, generator=generator)])
    found = precision_recall(few_modes, torch.randn(200, 8, generator=generator))
    assert found.precision > 0.7
    assert found.recall < 0.55


def test_pictures_are_added_in_parts_and_merged():
    def pictures(*greys, size=(8, 8)):
        return [Image.new("RGB", size, (grey, grey, grey)) for grey in greys]

    whole, one, other = (PrecisionRecall(Colours(), neighbours=1) for _ in range(3))
    for part in (whole, one):
        part.add([*pictures(0, 10), *pictures(40, size=(4, 8))], is_real=True)
    for part in (whole, other):
        part.add(pictures(5, 10, 90), is_real=False)
    one.merge(other.sums())
    assert one.counts == (3, 3)
    assert one.compute() == whole.compute() == pytest.approx((2 / 3, 1.0))
    with pytest.raises(
        ValueError, match="with k = 1 need 2 pictures or more of each kind; given are 0 real ones and 3"
    ):
        other.compute()
