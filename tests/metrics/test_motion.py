import math

import pytest
import torch

from asyncdiff_pl.metrics.motion import flicker, frame_difference, second_difference


@pytest.mark.parametrize(
    ("values", "difference", "second", "ratio"),
    [
        ([0.0, 0.1, 0.2, 0.3], 0.1, 0.0, 0.0),  # even motion
        ([0.0, 0.1, 0.0, 0.1], 0.1, 0.2, 2.0),  # flicker
        ([0.0, 0.1, 0.3, 0.6], 0.2, 0.1, 0.5),  # accelerated motion
        ([0.5, 0.2, 0.2, 0.2], 0.1, 0.15, 1.5),  # one jump
    ],
)
def test_one_clip(values, difference, second, ratio):
    clip = torch.tensor(values)[None, :, None, None, None].expand(1, len(values), 3, 5, 4)
    assert frame_difference(clip).tolist() == pytest.approx([difference])
    assert second_difference(clip).tolist() == pytest.approx([second], abs=1e-6)
    assert flicker(clip).item() == pytest.approx(ratio, abs=1e-5)


def test_independent_noise_has_the_root_of_three():
    noise = torch.randn(4, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert flicker(noise).item() == pytest.approx(math.sqrt(3), abs=0.01)


def test_clips_that_stand_still_do_not_count():
    moving = torch.tensor([0.0, 0.1, 0.3, 0.6]).view(1, 4, 1)
    assert flicker(torch.cat([moving, torch.zeros(3, 4, 1)])).item() == pytest.approx(flicker(moving).item())
    assert flicker(torch.zeros(2, 4, 1)).isnan()


def test_clips_are_not_mixed():
    clips = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])[..., None]
    assert frame_difference(clips).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("measure", "frames"), [(frame_difference, 1), (second_difference, 2), (flicker, 2)])
def test_too_few_frames(measure, frames):
    with pytest.raises(ValueError, match=rf"{frames + 1} or more frames; given is \(1, {frames}, 2\)"):
        measure(torch.zeros(1, frames, 2))
