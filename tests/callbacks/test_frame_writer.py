import io

import numpy as np
import pytest
from PIL import Image

from asyncdiff_pl.callbacks import FrameWriter
from asyncdiff_pl.callbacks.frame_writer import encode_gif


def test_a_video_is_frames_and_an_animation(run):
    run([FrameWriter(fps=10)])
    folder = run.folder / "frames" / "steps=2"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "1.gif", "10", "10.gif", "2", "2.gif"]
    frames = sorted((folder / "1").iterdir())
    assert [path.name for path in frames] == ["0000.png", "0001.png", "0002.png"]
    assert Image.open(frames[0]).size == (16, 16)
    animation = Image.open(folder / "1.gif")
    assert (animation.n_frames, animation.size, animation.info["duration"]) == (3, (16, 16), 100)


def test_a_picture_is_one_file(run, tiny_predictor):
    run([FrameWriter()], tiny_predictor(num_frames=1), ids=("a/b", "2"))
    assert sorted(path.name for path in (run.folder / "frames" / "steps=2").iterdir()) == ["2.png", "a%2Fb.png"]


def test_webp_and_no_pictures(run):
    run([FrameWriter(png=False, animation="webp")], ids=("1",))
    (path,) = (run.folder / "frames" / "steps=2").iterdir()
    assert path.name == "1.webp"
    assert Image.open(path).n_frames == 3


def test_tensorboard_has_the_conditioning_picture_and_the_animation(run, tiny_predictor):
    run([FrameWriter(max_tensorboard=2, animation="none", png=False)], tiny_predictor([2, 3]))
    events = run.events()
    tags = ["conditioning/1", "conditioning/2", "generated/1", "generated/2"]
    assert sorted(events.Tags()["images"]) == tags
    assert [event.step for event in events.Images("generated/1")] == [2, 3]
    shown = events.Images("generated/1")[0]
    assert Image.open(io.BytesIO(shown.encoded_image_string)).n_frames == 3
    conditioning = events.Images("conditioning/2")[0]
    assert (conditioning.width, conditioning.height) == (24, 16)
    assert not (run.folder / "frames").exists()


def test_a_gif_keeps_colours():
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    plane = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 128, np.uint8)], -1)
    frames = [Image.fromarray(np.roll(plane, 4 * shift, 1)) for shift in range(10)]
    animation = Image.open(io.BytesIO(encode_gif(frames, 7)))
    for index, frame in enumerate(frames):
        animation.seek(index)
        shown = np.asarray(animation.convert("RGB").reduce(4), float)
        assert np.abs(shown - np.asarray(frame.reduce(4), float)).mean() < 4


def test_an_impossible_pace_is_refused():
    with pytest.raises(ValueError, match="fps is 0"):
        FrameWriter(fps=0)
