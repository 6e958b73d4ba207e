"""Sheets of iterations: which states they show, and which frame of a video."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

from asyncdiff_pl.callbacks import iteration_sheet
from asyncdiff_pl.sampling import Iteration

SIDE = 16


def pipeline(kind):
    """With an autoencoder of one level."""
    torch.manual_seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",), "block_out_channels": (32,), "latent_channels": 4}
    return SimpleNamespace(vae=kind(**types).eval())


@pytest.mark.parametrize(
    ("kind", "frames"), [(AutoencoderKL, None), (AutoencoderKLTemporalDecoder, 1), (AutoencoderKL, 2)]
)
def test_the_last_cell_is_the_result_or_its_middle_frame(kind, frames):
    states, number, using = torch.randn(2, 10, 4, SIDE, SIDE, dtype=torch.float64), 9, pipeline(kind)
    video = states if frames is None else torch.stack([states + 9, states, states - 9], frames + 1)
    sheets = []
    for trajectories in (states, video):
        taken = []
        for iteration, left in enumerate((8, 5, 0, 0), 1):
            told = Iteration(iteration, [], [], [], [1, left], list(trajectories * iteration))
            taken.append(iteration_sheet.take(told, 1, using))
        sheets.append(np.asarray(iteration_sheet.draw(taken, [1.0] * (number + 1), using)))
    assert taken[0].numbers == [9, 7, 4, 2, 0]
    # titles, and three rows: the fourth iteration was another sample's
    assert sheets[0].shape[0] == 22 + 3 * (22 + SIDE) + 2 * 2
    # a video's as that of its middle frame alone
    assert np.array_equal(*sheets)


def test_long_runs_are_drawn_in_part():
    using, taken = pipeline(AutoencoderKL), []
    for number in range(1, 31):
        told = Iteration(number, [], [], [], [30 - number], [torch.zeros(3, 4, 80, 80)])
        taken.append(iteration_sheet.take(told, 0, using))
    assert iteration_sheet.draw(taken, [1.0] * 3, using).height == 22 + 6 * (22 + 80) + 5 * 2
