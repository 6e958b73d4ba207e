import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.util import img_mime_type_detector

from asyncdiff_pl.callbacks import FrameWriter, Results, frame_files
from asyncdiff_pl.callbacks.frame_files import encode_gif, encode_preview
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


# -- files ----------------------------------------------------------------------------------------------------------


def test_files_are_what_pillow_writes(run, tmp_path):
    for (prediction,) in run([FrameWriter(fps=10)], ids=("1", "2")):
        folder = run.folder / "frames" / "steps=2"
        for index, frame in enumerate(prediction.frames):
            frame.save(tmp_path / "frame.png")
            written = folder / prediction.sample.id / f"{index:04}.png"
            assert written.read_bytes() == (tmp_path / "frame.png").read_bytes()
        written = folder / f"{prediction.sample.id}.gif"
        assert written.read_bytes() == encode_gif(prediction.frames, 10)


def noise(number, width, height):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(number)]


def test_a_picture_in_tensorboard_is_a_small_jpeg():
    encoded, width, height = encode_preview(noise(1, 1024, 768), 7)
    assert (width, height) == Image.open(io.BytesIO(encoded)).size == (512, 384)
    assert len(encoded) < 2**19
    # as which TensorBoard hands it to the browser
    assert img_mime_type_detector.from_bytes(encoded) == "image/jpeg"


def test_an_animation_in_tensorboard_is_small_even_where_it_is_noise():
    encoded, width, height = encode_preview(noise(16, 512, 512), 7)
    animation = Image.open(io.BytesIO(encoded))
    assert (animation.n_frames, animation.size) == (16, (width, height))
    assert 64 <= width == height < 256
    assert len(encoded) < 2**19


# -- beside the run -------------------------------------------------------------------------------------------------

IDS = ("1", "2", "3", "4", "5")


def encoders():
    """Ids of the processes that encode frames for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_encoder = Path(frame_files.__file__).name in (path / "cmdline").read_text()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended just now
        if is_encoder and parent == os.getpid():
            found.append(int(path.name))
    return found


def encoder():
    """Id of the one process that encodes frames, which may be about to start."""
    for _ in range(200):
        found = encoders()
        if found:
            break
        time.sleep(0.02)
    (process,) = found
    return process


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert encoders() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frame_writer")]


class Disk:
    """Where a tiny run's pictures go, slow or full for some of them."""

    def __init__(self, folder):
        self.folder = folder / "frames" / "steps=2"
        self.folder.mkdir(parents=True)

    def slow(self, ids, before):
        """Lets the pictures of some samples be written only when `before`, which is given the id, returns."""
        for name in ids:
            os.mkfifo(self._unfinished(name))

        def read():
            for name in ids:
                before(name)
                # who opens a pipe to write waits for one who reads
                self._unfinished(name).read_bytes()

        threading.Thread(target=read, daemon=True).start()

    def full(self, name):
        self._unfinished(name).symlink_to("/dev/full")

    def mend(self, name):
        self._unfinished(name).unlink()

    def written(self):
        return sorted(path.name for path in self.folder.glob("[!.]*"))

    def _unfinished(self, name):
        return self.folder / f".{name}.png.tmp"


@pytest.fixture
def disk(run):
    return Disk(run.folder)


@pytest.fixture
def at_sample(tiny_predictor):
    """A module that does something before it makes a certain sample."""

    def make(name, act):
        module = tiny_predictor(num_frames=1)
        generate = module.generate

        def noted(samples, *args):
            if samples[0].id == name:
                act()
            return generate(samples, *args)

        module.generate = noted
        return module

    return make


def test_frames_are_encoded_in_a_process_without_torch(run, at_sample):
    libraries = []
    module = at_sample("5", lambda: libraries.append(Path(f"/proc/{encoder()}/maps").read_text()))
    run([FrameWriter()], module, ids=IDS)
    assert "_imaging" in libraries[0]
    assert "torch" not in libraries[0]


def test_where_nothing_is_written_no_process_starts(run, at_sample):
    found = []
    module = at_sample("5", lambda: found.extend(encoders()))
    run([FrameWriter(png=False, max_tensorboard=0)], module, ids=IDS)
    assert found == []


def test_the_next_sample_runs_while_frames_are_written(run, at_sample, disk):
    begun, waited = threading.Event(), []
    disk.slow(["1"], lambda name: waited.append(begun.wait(20)))
    run([FrameWriter()], at_sample("2", begun.set), ids=IDS)
    assert waited == [True]
    assert disk.written() == [f"{name}.png" for name in IDS]


def test_a_slow_disk_holds_the_run_up_before_memory_is_full(run, tiny_predictor, disk):
    module, made = tiny_predictor(num_frames=1), []

    def before(name):
        until = time.monotonic() + 20
        while len(module.made) < min(int(name) + 2, 5) and time.monotonic() < until:
            time.sleep(0.01)
        # none more, however long it takes
        time.sleep(0.3)
        made.append(len(module.made))

    disk.slow(IDS, before)
    run([FrameWriter()], module, ids=IDS)
    # the frames of two samples are kept, and a third's are just being made
    assert made == [3, 4, 5, 5, 5]
    assert disk.written() == [f"{name}.png" for name in IDS]


def test_frames_that_cannot_be_written_stop_the_run_and_are_made_again(run, tiny_predictor, disk):
    disk.full("2")
    module = tiny_predictor(num_frames=1)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        run([Results(), FrameWriter()], module, ids=IDS)
    made = [name for _, name in module.made]
    assert made in (["1", "2", "3"], ["1", "2", "3", "4"])
    rows = [row["id"] for row in read_table(run.folder / "samples.part0.csv")]
    # the batch in whose hook the error was told is not written
    assert rows == [name for name in made[:-1] if name != "2"]

    disk.mend("2")
    run([Results(), FrameWriter()], tiny_predictor(num_frames=1), ids=IDS)
    assert [name for _, name in run.module.made] == [name for name in IDS if name not in rows]
    assert len(read_table(run.folder / "samples.csv")) == 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_stopped_writes_what_is_made(run, tiny_predictor, disk, error):
    disk.slow(["1"], lambda name: time.sleep(0.5))
    module = tiny_predictor(num_frames=1, fail_at="3", error=error)
    with pytest.raises((error, SystemExit)):
        run([Results(), FrameWriter()], module, ids=IDS)
    assert disk.written() == ["1.png", "2.png"]
    assert [row["id"] for row in read_table(run.folder / "samples.part0.csv")] == ["1", "2"]


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(run, tiny_predictor, disk, caplog):
    disk.full("1")
    with pytest.raises(RuntimeError):
        run([FrameWriter()], tiny_predictor(num_frames=1, fail_at="2"), ids=IDS)
    assert "No space left on device" in caplog.text


def test_signals_to_all_processes_of_a_run_leave_its_frames_alone(run, at_sample, disk, capfd):
    def stop():
        process = encoder()
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)

    run([FrameWriter()], at_sample("2", stop), ids=IDS)
    assert disk.written() == [f"{name}.png" for name in IDS]
    assert "Traceback" not in capfd.readouterr().err


def test_an_encoder_that_is_killed_is_told_of_once(run, at_sample, caplog):
    with pytest.raises(RuntimeError, match="The process that writes frames was ended by SIGKILL"):
        run([FrameWriter()], at_sample("2", lambda: os.kill(encoder(), signal.SIGKILL)), ids=IDS)
    assert "could not be written" not in caplog.text


def test_an_encoder_whose_run_was_killed_ends_in_the_middle_of_a_file(disk):
    command = [sys.executable, "-P", frame_files.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        os.mkfifo(disk.folder / ".1.png.tmp")
        settings = {"pictures": [disk.folder / "1.png"], "animation": None, "fps": 7, "is_shown": False}
        pickle.dump((1, settings), process.stdin)
        pickle.dump(Image.new("RGB", (8, 8)), process.stdin)
        process.stdin.close()
        assert process.wait(20) == 0
    assert disk.written() == []
