import re

import pytest

from asyncdiff_pl.callbacks.sample_table import write_table
from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.strategies import GroupStrategy
from asyncdiff_pl.strategies.launcher import GroupLauncher

CUT = '[["conv_in", "down_blocks"], ["mid_block", "up_blocks", "conv_norm_out", "conv_out"]]'

STEPS = ("--model.num_inference_steps", "25")
NOISE = "--trainer.strategy.warm_up={until_noise: 0.98}"
AUTO = ("--trainer.strategy.stages", "1", "--trainer.strategy.layout", "auto")
DRIFT = "--trainer.strategy.warm_up={until_drift: 0.1, at_most: 9}"


@pytest.fixture
def dry_run(command, monkeypatch, capsys):
    """Lines of a dry run by their first word; starting ranks would be an error."""
    monkeypatch.setattr(GroupLauncher, "launch", None)

    def describe(*arguments, **kwargs):
        # the demo has refreshes of its own
        plain = () if "ddp" in arguments else ("--trainer.strategy.refresh_every", "null")
        with pytest.raises(SystemExit) as end:
            command.here("--dry-run", *plain, *arguments, **kwargs)
        assert end.value.code == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    return describe


def test_samples_ranks_cut_time_and_disk(dry_run, command):
    lines = dry_run("--data.height", "128", "--data.width", "128", "--model.num_frames", "8")
    assert lines["samples"] == "6 of 4 steps"
    assert lines["ranks"] == "2 on cpu: 1 data group of 2 (asyncdiff, stages 2, stride 1, warm_up 3, cfg 1)"
    shares = [int(share) for share in re.findall(r"(\d+)%", lines["cut"])]
    assert len(shares) == 2
    assert sum(shares) in (99, 100, 101)
    assert re.match(r"about \d+ (s|min) in the denoiser \(32\.\d GFLOP a call", lines["time"])
    # 6 videos of 8 frames: PNG and GIF of photographs, 2.1 bytes a pixel
    assert lines["disk"] == "about 1.6 MiB for 48 frames of 128x128"
    assert lines["folder"] == str(command.folder / "run" / "version_0")
    assert not list(command.folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model.num_inference_steps", "[3,5]"],
            {"samples": "6 x 2 step counts (3, 5) = 12", "note": "With 3 denoising steps, warm_up 3 leaves none"},
        ),
        (
            ["--model.num_inference_steps", "8", "--frame_writer.png", "false", "--frame_writer.animation", "none"],
            {"note": "With 8 denoising steps, warm_up 3 leaves at most 5 for 2 stages", "disk": "about 0.0 MiB"},
        ),
        (
            ["--trainer.devices", "4", "--data.max_images", "1", "--trainer.strategy.cut", CUT],
            {
                "exact": "3 of 4 steps of a sample",
                "ranks": "1 of the data groups have nothing to do",
                "cut": "stages of ",
            },
        ),
        ([*STEPS, NOISE], {"exact": "15 of 25 steps of a sample (warm-up until noise 0.98)"}),
        (
            [*STEPS, DRIFT, "--trainer.strategy.refresh_every", "5"],
            {
                "exact": "6 to 12 of 25 steps of a sample (warm",
                "ranks": "stride 1, warm_up until drift 0.1, at most 9, ",
                "time": " to ",
            },
        ),
        (["--trainer.strategy", "ddp"], {"ranks": "2 on cpu: 2 data groups of 1 (DDPStrategy)"}),
        (
            ["--trainer.strategy", "StepParallelStrategy"],
            {"ranks": "1 data group of 2 (steps, parallel_steps 2"},
        ),
        (
            [*AUTO, "--trainer.devices", "2", "--trainer.strategy.balance", "measured"],
            {
                "ranks": "1 data group of 2 (asyncdiff, stages 1, stride 1, warm_up 3, cfg 2",
                "layout": "by counted operations; the run itself measures",
            },
        ),
    ],
    ids=["step counts", "few steps", "data groups", "noise", "drift", "ddp", "steps", "auto"],
)
def test_what_a_setting_changes(dry_run, arguments, said):
    lines = dry_run(*arguments)
    for name, text in said.items():
        assert text in lines[name]


class Own(GroupStrategy):
    """A strategy that a user wrote."""

    def __init__(self, stages: int = 2) -> None:
        self.stages = stages
        super().__init__(Layout(stages=stages), stages, 60.0)

    def install(self, module):
        raise NotImplementedError

    def describe(self):
        return {"strategy": "own", "stages": self.stages}


def test_the_time_of_a_strategy_of_ones_own_is_not_foreseen(dry_run):
    lines = dry_run("--trainer.strategy", f"{__name__}.Own")
    assert "1 data group of 2 (own, stages 2)" in lines["ranks"]
    assert lines["time"] == "not known before a run: what ranks do by Own is not foreseen"


def test_a_cut_that_leaves_units_out(command):
    with pytest.raises(ValueError, match=r"The cut leaves out 31 units, 'down_blocks.0.resnets.0' for one; give each"):
        command.here("--dry-run", "--trainer.strategy.cut", '[["conv_in"], ["conv_out"]]')


def test_what_is_done_is_not_counted(dry_run, command):
    folder = command.log().path
    folder.mkdir(parents=True)
    rows = [{"steps": str(n), "id": name} for n, name in ((4, "1"), (4, "3"), (9, "1"))]
    write_table(folder / "samples.csv", rows, ["steps", "id"])
    lines = dry_run("--resume", str(folder))
    assert lines["samples"] == "6 of 4 steps, 2 of them done before"
    assert lines["folder"] == str(folder)


def test_full_size_svd_without_gpus(command, dry_run):
    images = ["--data.images_dir", "demo", "--data.annotations", "demo"]
    size = ["--data.height", "576", "--data.width", "1024", "--model.num_frames", "25", "--model.weights", "random"]
    with pytest.raises(ValueError, match=r"trainer.accelerator is gpu, but torch .* finds no GPU on this machine"):
        command.here("--dry-run", *images, config="svd_n3")
    lines = dry_run("--trainer.accelerator", "cpu", *images, *size, config="svd_n3")
    assert "160 TFLOP a call" in lines["time"]
    assert lines["model"] == "stabilityai/stable-video-diffusion-img2vid-xt, random weights, float16"
