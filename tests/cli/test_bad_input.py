"""Bad input is found before any rank is started: one sentence that names the value and the remedy."""

import json
import shutil

import pytest

from asyncdiff_pl.cli import checks
from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import with_named_configs
from asyncdiff_pl.data.coco import DEMO_FOLDER
from asyncdiff_pl.strategies.launcher import GroupLauncher

STRATEGY = "--trainer.strategy.init_args."

CASES = {
    "no such folder": (["--data.images_dir", "nowhere"], "images_dir nowhere is not a folder; give"),
    "no such annotations": (["--data.annotations", "nowhere.json"], "annotations nowhere.json is not a file; give"),
    "size": (["--data.height", "72"], "data.height is 72 pixels; the model takes multiples of 32"),
    "devices, stages": (["--trainer.devices", "3"], "2 ranks does not fit 3 ranks: start a multiple of 2, or change"),
    "devices, cfg": (["--trainer.devices", "3", STRATEGY + "stages", "1", STRATEGY + "cfg", "2"], "cfg 2 x .* 3 ranks"),
    "devices": (["--trainer.devices", "x"], "trainer.devices is x; give a number"),
    "stride": ([STRATEGY + "stride", "3"], "stride is 3; it must be 1 or 2"),
    "warm_up": ([STRATEGY + "warm_up", "0"], "warm_up is 0; at least 1 exact step"),
    "stages": ([STRATEGY + "stages", "9"], "stages is 9; it must be from 1 to 8"),
    "stages, no number": ([STRATEGY + "stages", "x"], "^trainer.strategy.stages is x; it must be int.$"),
    "cut": ([STRATEGY + "cut", '[["conv_in"]]'], "The cut has 1 stages, but stages is 2; make them equal"),
    "guidance": (
        [STRATEGY + "stages", "1", STRATEGY + "cfg", "2", "--model.max_guidance_scale", "1.0"],
        "cfg 2 halves the guidance batch, but guidance is off: turn it on",
    ),
    "scheduler": (["--model.scheduler", "nonsense"], "There is no scheduler nonsense; take euler_discrete"),
    "pretrained": (["--model.pretrained", "./nowhere"], "There is no folder ./nowhere; give an existing one"),
    "clip": (["--clip_score.model", "./nowhere"], "There is no folder ./nowhere; give an existing one"),
    "steps": (["--model.num_inference_steps", "0"], "^num_inference_steps is 0; give one or more numbers from 1 up.$"),
    "steps, no number": (
        ["--model.num_inference_steps", "abc"],
        r"^model.num_inference_steps is abc; it must be int or list\[int\].$",
    ),
    "choice": (["--data.fit", "zoom"], "^data.fit is zoom; it must be crop, pad or stretch.$"),
    "class": (["--model", "Nonsense"], "^model is Nonsense; it must be a LightningModule"),
    "module": (["--model", "no_such_module.Thing"], "No module named 'no_such_module'"),
    "reference": (["--reference_metrics.folder", "nowhere"], "There is no folder nowhere to compare with; give"),
    "reference, no frames": (["--reference_metrics.folder", "."], r"^\. holds no frames; give the log folder of a run"),
    "real pictures": (["--frechet_distance.real", "nowhere"], "There is no folder nowhere of real pictures; give"),
    "callback": (["--clip_score.batch_size", "0"], "^batch_size is 0; give a number of frames from 1 up.$"),
    "option": (["--no_such_option", "3"], "^There is no setting --no_such_option; `predict --help` explains"),
    "model's option": (["--model.no_such", "3"], "^There is no setting model.no_such; `predict --help` explains"),
    "resume": (["--resume", "nowhere"], "There is no log folder nowhere to resume; give"),
    "resume, no logger": (["--resume", ".", "--trainer.logger", "false"], "--resume needs a logger with a folder"),
}


@pytest.mark.parametrize(("arguments", "sentence"), CASES.values(), ids=CASES.keys())
def test_one_sentence_before_any_rank_starts(command, monkeypatch, arguments, sentence):
    monkeypatch.setattr(GroupLauncher, "launch", None)
    with pytest.raises(ValueError, match=sentence) as error:
        command.here(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert not list(command.folder.iterdir())


IMAGES = [{"id": 1, "file_name": "demo_000001.png"}, {"id": 2, "file_name": "demo_000002.png"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("hello", "is not JSON"),
        ([1, 2], "has another format .it holds a list"),
        ({"images": IMAGES, "annotations": [{"image_id": 1, "id": 1, "category_id": 1}]}, "have no `caption`"),
        (
            {"images": IMAGES, "annotations": [{"image_id": 1, "id": 1, "caption": "a ball"}]},
            "1 of the 2 .*no caption",
        ),
    ],
    ids=["no JSON", "list", "instances", "image without captions"],
)
def test_annotations_of_another_format(command, tmp_path, content, sentence):
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        command.here("--data.annotations", str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("model: [", "is not YAML"), ("- 1", "holds no settings"), ("modell:\n  seed: 1", "no setting modell.seed")],
)
def test_a_config_that_is_none(command, tmp_path, text, sentence):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        run(with_named_configs(["predict", "--config", str(config)]))


def test_gpus_that_are_not_there(command, monkeypatch):
    with pytest.raises(ValueError, match=r"trainer.accelerator is gpu, but torch .* finds no GPU .* give `--trainer"):
        command.here("--trainer.accelerator", "gpu")
    monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"trainer.devices is 2, but this machine has 1 GPUs: take a layout of fewer"):
        command.here("--trainer.accelerator", "gpu")


def test_an_unreadable_image_is_left_out_of_a_run_that_goes_on(command, tmp_path, recwarn, capsys):
    images = shutil.copytree(DEMO_FOLDER / "images", tmp_path / "images")
    broken = images / "demo_000002.png"
    broken.write_bytes(broken.read_bytes()[:300])
    one = ("--trainer.devices", "1", "--trainer.strategy.stages", "1", "--model.num_inference_steps", "[1, 2]")
    command.here("--data.images_dir", str(images), "--data.max_images", "3", *one)
    assert [(row["steps"], row["id"]) for row in command.log().samples()] == [(n, i) for n in "12" for i in "13"]
    said = [str(warning.message) for warning in recwarn if "demo_000002" in str(warning.message)]
    assert len(said) == 1
    assert "cannot be read" in said[0]
    assert "1 of the images could not be read" in capsys.readouterr().out
