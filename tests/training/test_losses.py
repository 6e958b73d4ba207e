"""The losses are low where they should be, and say what is wrong where not."""

import math

import pytest
import torch

from asyncdiff_pl.training.contrastive import contrastive_loss
from asyncdiff_pl.training.learning_rate import warm_up_cosine
from asyncdiff_pl.training.motion import MEDIAN_DIFFERENCE, motion_bucket
from asyncdiff_pl.training.reconstruction import gradient_loss, normal_divergence, pixel_loss

SCALE = torch.tensor(10.0)


def test_contrast_of_pairs_that_match_and_do_not():
    images = torch.eye(4)
    assert contrastive_loss(images, images, SCALE) < 0.001
    assert contrastive_loss(images, images.roll(1, 0), SCALE) > 9


def test_a_changed_text_counts_for_its_own_image_alone():
    images = torch.eye(4)
    changed = torch.zeros(4, 2, 4)
    changed[0, 0] = images[0]  # as similar as the true text
    # half a chance for one of four images, in one of two directions
    loss = contrastive_loss(images, images, SCALE, changed)
    assert loss == pytest.approx(math.log(2) / 8, abs=0.001)


def test_other_texts_that_are_true_do_not_count():
    images = torch.eye(3)[[0, 0, 1]]
    also_true = torch.zeros(3, 3, dtype=torch.bool)
    assert contrastive_loss(images, images, SCALE, also_true=also_true) > 0.4
    also_true[0, 1] = also_true[1, 0] = True
    assert contrastive_loss(images, images, SCALE, also_true=also_true) < 0.001


def test_reconstruction():
    pictures = torch.rand(2, 3, 8, 8)
    assert pixel_loss(pictures, pictures) == gradient_loss(pictures, pictures) == 0
    # another brightness is no error of edges
    assert pixel_loss(pictures + 0.5, pictures) == pytest.approx(0.75)
    assert gradient_loss(pictures + 0.5, pictures) < 1e-6
    assert normal_divergence(torch.zeros(3), torch.zeros(3)) == 0
    assert normal_divergence(torch.ones(3), torch.zeros(3)) == 0.5


@pytest.mark.parametrize(("times", "bucket"), [(0.0, 1), (0.5, 85), (1, 127.5), (2, 170), (30, 246.8)])
def test_motion(times, bucket):
    clip = torch.arange(4).view(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2) * times * MEDIAN_DIFFERENCE
    assert motion_bucket(clip).item() == pytest.approx(bucket, abs=0.1)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 1), (10, 1), (60, 0.5), (110, 0), (200, 0)])
def test_learning_rate(step, factor):
    assert warm_up_cosine(step, warm_up=10, total=110) == pytest.approx(factor, abs=1e-6)
