import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from asyncdiff_pl.callbacks import FrameWriter, Results, frame_writer
from asyncdiff_pl.callbacks.frame_writer import encode_gif
from asyncdiff_pl.callbacks.sample_table import read_table


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


# -- beside the run -------------------------------------------------------------------------------------------------


class Disk:
    """Notes what is written, in order, and does something before each file."""

    def __init__(self, monkeypatch, before):
        self.written = []
        self._before, self._write = before, frame_writer.write_atomically
        monkeypatch.setattr(frame_writer, "write_atomically", self)

    def __call__(self, path, write):
        self._before(path)
        self._write(path, write)
        self.written.append(path.stem)


IDS = ("1", "2", "3", "4", "5")


def test_the_next_sample_runs_while_frames_are_written(run, tiny_predictor, monkeypatch):
    begun, module = threading.Event(), tiny_predictor(num_frames=1)
    generate = module.generate

    def noted(samples, *args):
        if samples[0].id == "2":
            begun.set()
        return generate(samples, *args)

    module.generate = noted
    waited = []
    disk = Disk(monkeypatch, lambda path: waited.append(begun.wait(20)) if path.stem == "1" else None)
    run([FrameWriter()], module, ids=IDS)
    assert waited == [True]
    assert disk.written == list(IDS)


def test_a_slow_disk_holds_the_run_up_before_memory_is_full(run, tiny_predictor, monkeypatch):
    module, made = tiny_predictor(num_frames=1), []

    def before(path):
        time.sleep(0.3)
        made.append(len(module.made))

    disk = Disk(monkeypatch, before)
    run([FrameWriter()], module, ids=IDS)
    # the frames of two samples are kept, and a third's are just being made
    assert made == [3, 4, 5, 5, 5]
    assert disk.written == list(IDS)


def test_frames_that_cannot_be_written_stop_the_run_and_are_made_again(run, tiny_predictor, monkeypatch):
    def full(path):
        if path.stem == "2":
            raise OSError("No space left on device")

    Disk(monkeypatch, full)
    module = tiny_predictor(num_frames=1)
    with pytest.raises(OSError, match="No space left"):
        run([Results(), FrameWriter()], module, ids=IDS)
    made = [name for _, name in module.made]
    assert made in (["1", "2", "3"], ["1", "2", "3", "4"])
    rows = [row["id"] for row in read_table(run.folder / "samples.part0.csv")]
    # the batch in whose hook the error was told is not written
    assert rows == [name for name in made[:-1] if name != "2"]

    monkeypatch.undo()
    run([Results(), FrameWriter()], tiny_predictor(num_frames=1), ids=IDS)
    assert [name for _, name in run.module.made] == [name for name in IDS if name not in rows]
    assert len(read_table(run.folder / "samples.csv")) == 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_stopped_writes_what_is_made(run, tiny_predictor, monkeypatch, error):
    Disk(monkeypatch, lambda path: time.sleep(0.2))
    module = tiny_predictor(num_frames=1, fail_at="3", error=error)
    with pytest.raises((error, SystemExit)):
        run([Results(), FrameWriter()], module, ids=IDS)
    folder = run.folder / "frames" / "steps=2"
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png"]
    assert [row["id"] for row in read_table(run.folder / "samples.part0.csv")] == ["1", "2"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frame_writer")]


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(run, tiny_predictor, monkeypatch, caplog):
    def full(path):
        time.sleep(0.2)
        raise OSError("No space left on device")

    Disk(monkeypatch, full)
    with pytest.raises(RuntimeError):
        run([FrameWriter()], tiny_predictor(num_frames=1, fail_at="2"), ids=IDS)
    assert "No space left on device" in caplog.text
