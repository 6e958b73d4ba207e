"""`validate` and `test` of a tiny DDPM that was trained: what they say is what a hand computes, and errors are told."""

import contextlib
import csv
import io
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.help import settings_parser
from asyncdiff_pl.cli.overview import overview, with_named_configs
from asyncdiff_pl.cli.picture_test import PictureTest
from asyncdiff_pl.cli.test import run_test
from asyncdiff_pl.models import UnconditionalPredictor

TINY = (
    *("--config", "demo_ddpm", "--model.size", "8", "--model.channels", "16", "--model.attention", "[4]"),
    *("--model.sample_steps", "2", "--model.num_samples", "1", "--data.size", "8", "--data.batch_size", "4"),
    *("--data.validation_batches", "2"),
)
MADE = ("--pictures.number=10", "--pictures.batch_size=4", "--pictures.num_inference_steps=2", "--pictures.max_real=20")


class Colours(nn.Module):
    """The mean of each colour, and its spread."""

    def forward(self, pictures):
        values = pictures.double() / 255
        return values.mean((2, 3)) + values.std((2, 3))


FEATURES = f"{__name__}.Colours"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Log folder of a run of eight steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(sys, "argv", ["asyncdiff_pl"])
        ends = ("--trainer.max_steps", "8", "--trainer.val_check_interval", "4")
        run(with_named_configs(["fit", *TINY, *ends, "--trainer.logger.save_dir", str(folder)]))
    return folder / "demo_ddpm" / "version_0"


@pytest.fixture
def ddpm_test(command, monkeypatch):
    """Runs `test`, and gives its row of results.csv."""
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(command.folder / "cache"))

    def start(*more, name="demo_ddpm", last=()):
        logger = ("--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name", name)
        given = [*more, *MADE, "--pictures.features", FEATURES, *logger, *last]
        run_test(with_named_configs(["test", *given])[1:])
        return row(command.folder / f"{name}_test" / "version_0")

    return start


def row(folder):
    with (folder / "results.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    return found


def validate(folder, *more):
    logger = ("--trainer.logger.save_dir", str(folder))
    run(with_named_configs(["validate", *more, *logger]))


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_checkpoint_has_the_loss_that_it_had_in_training(command, trained, capsys):
    expected = scalars(trained, "validation/loss")[-1]
    validate(command.folder, "--ckpt_path", str(trained))
    folder = command.folder / "demo_ddpm_validate" / "version_0"
    with (folder / "validation.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["step"], found["pictures"]) == ("8", "8")
    assert found["checkpoint"] == str(trained / "checkpoints" / "last.ckpt")
    assert float(found["validation/loss"]) == pytest.approx(expected[1], rel=1e-5)
    # at the place where training's own curve ends
    assert scalars(folder, "validation/loss") == [(expected[0], pytest.approx(expected[1]))]
    said = capsys.readouterr().out.splitlines()
    assert said[-3].split() == ["checkpoint", "step", "pictures", "validation/loss"]
    assert said[-1] == f"results: {folder}"


def features(pictures):
    values = pictures.astype(np.float64).transpose(0, 3, 1, 2) / 255
    return values.mean((2, 3)) + values.std((2, 3), ddof=1)


def frechet(real, made):
    means = real.mean(0) - made.mean(0)
    covariances = np.cov(real.T), np.cov(made.T)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    return means @ means + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()


def covered(points, balls):
    """Share of points within the ball around any of others that reaches to its third neighbour."""
    radii = np.sort(np.linalg.norm(balls[:, None] - balls, axis=-1), axis=1)[:, 3]
    return (np.linalg.norm(points[:, None] - balls, axis=-1) <= radii).any(1).mean()


def test_pictures_of_the_newest_run_are_measured_against_the_training_set(command, trained, ddpm_test, capsys):
    # without --ckpt_path: the newest run of the config's name
    (command.folder / "demo_ddpm").symlink_to(trained.parent)
    found = ddpm_test(*TINY, "--pictures.png=true")
    folder = command.folder / "demo_ddpm_test" / "version_0"
    with np.load(folder / "pictures" / "steps=2.npz") as arrays:
        made = arrays["images"]
    files = [np.asarray(Image.open(folder / "frames" / "steps=2" / f"{number}.png")) for number in range(10)]
    assert np.array_equal(made, np.stack(files))
    (scenes,) = (command.folder / "cache" / "scenes").glob("*.npz")
    with np.load(scenes) as arrays:
        real = arrays["images"]
    assert (len(made), len(real)) == (10, 20)
    made, real = features(made), features(real)
    assert float(found[f"frechet_distance ({FEATURES})"]) == pytest.approx(frechet(real, made), rel=1e-3)
    assert float(found[f"precision ({FEATURES})"]) == pytest.approx(covered(made, real))
    assert float(found[f"recall ({FEATURES})"]) == pytest.approx(covered(real, made))
    assert found["model"] == str(trained / "checkpoints" / "last-step=8")
    assert f"frechet_distance ({FEATURES})" in capsys.readouterr().out


def test_a_test_that_was_stopped_goes_on(command, trained, ddpm_test, monkeypatch, capsys):
    given = ("--ckpt_path", str(trained / "checkpoints" / "last.ckpt"))
    whole = ddpm_test(*given, name="whole", last=("--pictures.batch_size=10",))
    # a batch of many pictures has one line
    assert re.findall(r"^\d+/10 .*steps\)", capsys.readouterr().out, re.MULTILINE) == ["10/10 0 to 9 (2 steps)"]
    generate = UnconditionalPredictor.generate

    def stop(module, samples, *args):
        if samples[0].id == "8":
            raise KeyboardInterrupt
        return generate(module, samples, *args)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(UnconditionalPredictor, "generate", stop)
        ddpm_test(*given, name="stopped")
    folder = command.folder / "stopped_test" / "version_0"
    assert not (folder / "results.csv").exists()
    run_test(with_named_configs(["test", "--resume", str(folder)])[1:])
    assert "8 samples are done" in capsys.readouterr().out
    columns = [name for name in whole if FEATURES in name]
    assert len(columns) == 3
    found = row(folder)
    assert [float(found[name]) for name in columns] == [pytest.approx(float(whole[name]), rel=1e-4) for name in columns]


def test_an_exported_pipeline_and_real_pictures_of_another_kind(command, trained, ddpm_test):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    (command.folder / "archive").mkdir()
    np.savez(command.folder / "archive" / "train.npz", images=pictures)
    for number, pixels in enumerate(pictures):
        path = command.folder / "files" / "train" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    given = (*TINY[: TINY.index("--data.size")], "--data", "Cifar10", "--data.size", "8")
    given = (*given, "--ckpt_path", str(trained / "export"))
    one, other = (
        ddpm_test(*given, "--data.path", str(command.folder / kind), name=kind) for kind in ("archive", "files")
    )
    assert (one["model"], one["real_pictures"]) == (str(trained / "export"), str(command.folder / "archive"))
    for name in (name for name in one if FEATURES in name):
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4)
    assert float(one[f"frechet_distance ({FEATURES})"]) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"There is no run with a state in .*/none: train with `fit` first, or give `--ckpt_path`"),
        (("--ckpt_path", "nowhere"), r"There is no nowhere; give `--ckpt_path` the log folder of a run"),
        (("--ckpt_path", "."), r"\. holds no checkpoints/last.ckpt"),
        (("--ckpt_path", "text.ckpt"), r"text.ckpt is no checkpoint that can be read"),
        (("--ckpt_path", "{run}", "--model.channels", "32"), r"of another network .* network.conv_in.weight is \(16"),
    ],
)
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_no_checkpoint_and_another_network(command, trained, ddpm_test, monkeypatch, subcommand, more, message):
    monkeypatch.chdir(command.folder)
    (command.folder / "text.ckpt").write_text("no checkpoint")
    more = [part.format(run=trained) for part in more]
    start = (
        ddpm_test
        if subcommand == "test"
        else lambda *given, name: validate(command.folder, *given, "--trainer.logger.name", name)
    )
    with pytest.raises(ValueError, match=message):
        start(*TINY, *more, name="none")


def test_what_is_no_use_to_validate(trained):
    for more, message in [
        (("--resume", str(trained)), "validate has nothing to go on with: leave `--resume` out"),
        (("--config", "demo"), "demo is a config of `predict`: .* predict --config demo"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(with_named_configs(["validate", *more]))


def test_a_checkpoint_tells_its_config_and_a_log_folder_its_export(trained):
    config = ["--config", str(trained / "config.yaml")]
    for path in (trained, trained / "export", trained / "checkpoints" / "last.ckpt"):
        assert with_named_configs(["test", f"--ckpt_path={path}"])[1:3] == config
        assert with_named_configs(["validate", "--ckpt_path", str(path)])[1:3] == config
    assert with_named_configs(["test", "--ckpt_path", "/"]) == ["test", "--ckpt_path", "/"]
    assert UnconditionalPredictor(str(trained)).pretrained == str(trained / "export")


SURFACE = {
    "number": 10000,
    "batch_size": 500,
    "sampler": "ddim",
    "num_inference_steps": 50,
    "eta": 0.0,
    "skip": "linear",
    "variance": None,
    "features": "inception",
    "precision_features": None,
    "max_real": None,
    "dtype": None,
    "seed": 0,
    "png": False,
}


def test_help_explains_what_is_tested(command):
    assert dict(vars(settings_parser("pictures", PictureTest).get_defaults().pictures)) == SURFACE
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        run_test(["--help"])
    text = out.getvalue()
    for name in SURFACE:
        assert len(re.findall(rf"^  --pictures.{name} ", text, re.MULTILINE)) == 1, name
    assert "--average.decay" not in text
    assert "--resume FOLDER" in text
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        run(["validate", "--help"])
    assert "--ckpt_path CKPT_PATH\n                        Log folder of a run of `fit`" in out.getvalue()
    assert "--resume FOLDER" not in out.getvalue()
    assert all(f"{subcommand} --config CONFIG [--ckpt_path RUN]" in overview() for subcommand in ("validate", "test"))


def test_no_real_set_and_no_ddpm(command, trained, ddpm_test):
    given = [*TINY[: TINY.index("--data.size")], "--data", "Cifar10", "--data.path", "nowhere"]
    with pytest.raises(ValueError, match=r"nowhere holds neither CIFAR-10's batches nor .npz files nor pictures"):
        ddpm_test(*given, "--ckpt_path", str(trained))
    with pytest.raises(ValueError, match=r"test measures the pictures of a DDPM, and the config's model is Autoenc"):
        ddpm_test("--config", "train/image_autoencoder", "--ckpt_path", str(trained), "--trainer.accelerator", "cpu")
