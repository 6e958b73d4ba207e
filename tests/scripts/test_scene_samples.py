"""The pieces that scripts are made of, with networks of random weights."""

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from measure_quality import parse_shard
from PIL import Image
from scene_samples import FPS, PerSceneMotion, Scorer, generate_videos, held_out, load
from sheets import rounded, save_gif, sheet, to_images

from asyncdiff_pl.data.scenes import captions, sample_scenes
from asyncdiff_pl.models.noise import sample_seed


@pytest.fixture(scope="module")
def data():
    return held_out(3, num_frames=4, batch_size=2)


def test_held_out_scenes_are_those_of_the_split(data):
    assert data.clips.shape == (3, 4, 3, 128, 128)
    assert data.captions == captions(sample_scenes(torch.arange(3), "test"))
    assert torch.equal(data.clips, rounded(data.clips))
    assert torch.equal(held_out(3).pictures, data.pictures)
    assert len(data.motion_bucket_ids) == 3


def test_pictures_survive_files(data, tmp_path):
    images = to_images(data.pictures)
    images[0].save(tmp_path / "0.png")
    pixels = torch.frombuffer(bytearray(Image.open(tmp_path / "0.png").tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(128, 128, 3).permute(2, 0, 1) / 255, data.pictures[0])


def test_videos_do_not_depend_on_the_batch_and_follow_their_own_motion(data):
    pipe = load(StableVideoDiffusionPipeline, "tiny-svd", "float32", "cpu")
    assert isinstance(pipe, PerSceneMotion)
    pictures = torch.nn.functional.interpolate(data.pictures[:2], size=(64, 64), mode="area")
    together = generate_videos(pipe, pictures, [20, 200], steps=1, batch_size=2)
    alone = generate_videos(pipe, pictures, [20, 200], steps=1, batch_size=1)
    assert together.shape == (2, pipe.unet.config.num_frames, 3, 64, 64)
    assert torch.allclose(together, alone, atol=1e-3)
    # what diffusers' own pipeline makes of the first one
    own = StableVideoDiffusionPipeline(**pipe.components)
    own.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(sample_seed(0, "0"))
    expected = own(
        to_images(pictures[:1]),
        height=64,
        width=64,
        num_inference_steps=1,
        fps=7,
        motion_bucket_id=20,
        generator=noise,
        output_type="pt",
    ).frames
    assert torch.allclose(together[:1], expected, atol=1e-3)
    others = generate_videos(pipe, pictures, [20, 20], steps=1, batch_size=2)
    assert torch.allclose(together[0], others[0], atol=1e-3)
    assert not torch.equal(together[1], others[1])


def test_scores_are_those_of_single_pictures(data):
    scorer = Scorer(batch_size=5)
    found = scorer.frames(data.clips, data.captions)
    assert found.shape == (3, 4)
    for clip, words, row in zip(data.clips, data.captions, found, strict=True):
        expected = scorer.score.pairs(to_images(clip), words).mean(1)
        assert torch.allclose(row, expected, atol=1e-3)


def test_sheets(data, tmp_path):
    assert sheet(data.pictures, columns=2, gap=4).size == (260, 260)
    save_gif(data.clips, tmp_path / "clips.gif", columns=3, fps=FPS)
    with Image.open(tmp_path / "clips.gif") as animation:
        assert (animation.size, animation.n_frames) == ((392, 128), 4)


@pytest.mark.parametrize(("shard", "expected"), [("0/1", (0, 1)), ("3/4", (3, 4))])
def test_a_shard(shard, expected):
    assert parse_shard(shard) == expected


@pytest.mark.parametrize("shard", ["4/4", "1", "a/4", "1/4/2", "-1/4"])
def test_a_shard_that_does_not_read(shard):
    with pytest.raises(ValueError, match=f"shard is {shard}; give"):
        parse_shard(shard)
