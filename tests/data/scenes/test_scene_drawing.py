import dataclasses

import pytest
import torch
import torch.nn.functional as F

from asyncdiff_pl.data.scenes import draw, sample_scenes, sampling
from asyncdiff_pl.data.scenes.attributes import BACKGROUNDS, COLOURS, MATERIALS, SHAPES
from asyncdiff_pl.data.scenes.draw import _tables as draw_tables
from asyncdiff_pl.data.scenes.motion import PATHS, fold, pose_at
from asyncdiff_pl.data.scenes.palettes import PALETTES, clashes, object_colours
from asyncdiff_pl.data.scenes.textures import shape_table, sky_table


def times(count, frames, fps=7):
    return (torch.arange(frames) / fps).expand(count, -1)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("max_objects", [1, 3])
def test_shape_range_and_type(size, max_objects):
    scenes = sample_scenes(torch.arange(6), max_objects=max_objects)
    clips = draw(scenes, times(6, 2), size)
    assert clips.shape == (6, 2, 3, size, size) and clips.dtype == torch.float32
    assert clips.isfinite().all() and clips.min() >= 0 and clips.max() <= 1
    assert (clips.flatten(1).std(1) > 0.02).all()


def test_a_clip_alone_equals_the_clip_in_a_batch():
    scenes = sample_scenes(torch.arange(12), "test")
    batch = draw(scenes, times(12, 3), 48)
    assert torch.allclose(draw(scenes[7:8], times(1, 3), 48)[0], batch[7], atol=1e-5)
    assert torch.allclose(draw(scenes, times(12, 3)[:, 2:], 48)[:, 0], batch[:, 2], atol=1e-5)


def test_a_first_call_in_another_mode_leaves_nothing_behind():
    """Lightning validates in inference mode, perhaps in bfloat16, before it trains."""
    scenes = sample_scenes(torch.arange(4))
    expected = draw(scenes, times(4, 1), 32)
    for cached in (shape_table, sky_table, sampling._tables, draw_tables):
        cached.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        draw(sample_scenes(torch.arange(2)), times(2, 1), 32)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    pictures = draw(sample_scenes(torch.arange(4)), times(4, 1), 32)
    assert torch.equal(pictures, expected)
    (pictures * weight).sum().backward()
    assert weight.grad is not None


def test_a_larger_picture_shows_the_same():
    scenes = sample_scenes(torch.arange(16))
    small, large = draw(scenes, times(16, 1), 64)[:, 0], draw(scenes, times(16, 1), 128)[:, 0]
    error = (F.avg_pool2d(large, 2) - small).abs().mean((1, 2, 3))
    assert error.max() < 0.012


def test_pictures_have_no_fine_grain():
    """Half the resolution keeps nearly all, so that an autoencoder of factor 4 has a chance."""
    pictures = draw(sample_scenes(torch.arange(48)), times(48, 1))[:, 0]
    half = F.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True)
    error = (F.interpolate(half, scale_factor=2, mode="bicubic") - pictures).square().mean()
    assert -10 * error.log10() > 28.5


def test_each_shape_is_unlike_the_others():
    one = sample_scenes(torch.tensor([3]), max_objects=1)
    scenes = one[torch.zeros(len(SHAPES), dtype=torch.int64)]
    scenes.shape[:, 0] = torch.arange(len(SHAPES))
    scenes.size[:], scenes.radius[:], scenes.position[:] = 2, 0.48, 0
    pictures = draw(scenes, times(len(SHAPES), 1), 64)[:, 0]
    apart = (pictures[:, None] - pictures).abs().mean((2, 3, 4)) + torch.eye(len(SHAPES))
    assert apart.min() > 0.01


@pytest.mark.parametrize("material", [name for name in MATERIALS if name not in ("metallic", "striped", "dotted")])
def test_objects_have_their_colour_in_the_middle(material):
    scenes = sample_scenes(torch.zeros(len(COLOURS), dtype=torch.int64), max_objects=1)
    scenes.colour[:, 0] = torch.arange(len(COLOURS))
    scenes.shape[:], scenes.material[:], scenes.position[:], scenes.radius[:] = 0, MATERIALS.index(material), 0, 0.48
    middle = draw(scenes, times(len(COLOURS), 1), 64)[:, 0, :, 29:35, 29:35].mean((2, 3))
    distance = torch.cdist(middle, object_colours()[:, 0])
    assert distance.argmin(1).tolist() == list(range(len(COLOURS)))


def test_an_object_that_is_not_there_is_not_drawn():
    scenes = sample_scenes(torch.arange(30))
    alone = scenes[scenes.number == 1]
    other = dataclasses.replace(alone, position=alone.position * torch.tensor([1, -1, -1])[:, None])
    assert torch.equal(draw(alone, times(len(alone), 1), 32), draw(other, times(len(alone), 1), 32))


def test_motion_is_smooth_and_not_still():
    scenes = sample_scenes(torch.arange(400))
    pose = pose_at(scenes, times(400, 8))
    step = (pose.centre[:, 1:] - pose.centre[:, :-1]).norm(dim=-1) * 64
    assert step.max() < 9
    mean = step[:, :, 0].mean(1)
    low, middle, high = mean.quantile(torch.tensor([0.1, 0.5, 0.95])).tolist()
    assert low < 0.4 and 0.6 < middle < 2 and high > 3
    # ten times finer steps in time are ten times shorter ways: no jumps
    fine = pose_at(scenes, times(400, 80, fps=70))
    assert (fine.centre[:, 1:] - fine.centre[:, :-1]).norm(dim=-1).max() * 64 < 1.7


def test_objects_stay_in_view_for_ever():
    scenes = sample_scenes(torch.arange(300))
    pose = pose_at(scenes, times(300, 200))
    assert pose.centre.abs().max() < 1
    beyond = pose.centre.abs() + pose.radius[..., None] > 1.1
    assert beyond.float().mean() < 0.01


@pytest.mark.parametrize("path", range(len(PATHS)))
def test_every_path_begins_at_the_position(path):
    scenes = sample_scenes(torch.arange(300))
    scenes.path[:] = path
    assert torch.allclose(pose_at(scenes, torch.zeros(300, 1)).centre[:, 0], scenes.position, atol=0.01)


def test_fold_reflects():
    limit = torch.tensor(1.0)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -1.5])
    assert fold(values, limit).tolist() == [0, 0.5, 1, 0.5, 0, -1, 0, -0.5]


def test_backgrounds_move_with_the_camera():
    scenes = sample_scenes(torch.arange(len(BACKGROUNDS)), max_objects=1)
    scenes.background[:], scenes.palette[:], scenes.number[:] = torch.arange(len(BACKGROUNDS)), 0, 0
    scenes.pan[:], scenes.sway[:] = torch.tensor([0.4, 0.0]), 0
    clip = draw(scenes, times(len(BACKGROUNDS), 3), 48)
    moved = (clip[:, 1:] - clip[:, :-1]).abs().mean((1, 2, 3, 4))
    still = BACKGROUNDS.index("gradient")
    assert moved[still] < 1e-6
    assert (moved[torch.arange(len(BACKGROUNDS)) != still] > 5e-4).all()


def test_every_background_leaves_enough_colours():
    clash = clashes()
    for kind, name in enumerate(BACKGROUNDS):
        for number, colour in enumerate(PALETTES[name]):
            assert (~clash[kind, number]).sum() >= 3, (name, colour)
            if colour in COLOURS:
                assert clash[kind, number, COLOURS.index(colour)]
