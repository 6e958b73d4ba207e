"""DDPMs as a user trains them and makes pictures with them, and a run that is killed and goes on."""

import re
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncdiff_pl.callbacks import TrainingState
from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import CONFIGS, is_training, packaged_configs, with_named_configs
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.training import loss_weights, timesteps

TINY = (
    *("--model.size", "8", "--model.channels", "16", "--model.attention", "[4]", "--model.num_samples", "4"),
    *("--model.sample_steps", "3", "--model.optimizer.schedule", "constant", "--trainer.val_check_interval", "6"),
    *("--data.size", "8", "--data.batch_size", "4", "--data.validation_batches", "1"),
    *("--trainer.log_every_n_steps", "1", "--progress_bar.line_seconds", "0", "--state.every_n_steps", "5"),
)
CIFAR = [name for name in packaged_configs() if name.startswith("ddpm_cifar10")]
METHODS = {
    "ddpm_cifar10": (timesteps.UniformTimesteps, loss_weights.UniformWeight),
    "ddpm_cifar10_minsnr": (timesteps.UniformTimesteps, loss_weights.MinSNRWeight),
    "ddpm_cifar10_p2": (timesteps.UniformTimesteps, loss_weights.P2Weight),
    "ddpm_cifar10_speed": (timesteps.SpeeD, loss_weights.UniformWeight),
    "ddpm_cifar10_beta_policy": (timesteps.BetaPolicy, loss_weights.UniformWeight),
    "ddpm_cifar10_adaptive": (timesteps.AdaptiveTimesteps, loss_weights.UniformWeight),
}


def fit(folder, name, *more):
    run(with_named_configs(arguments(folder, name, *more)))
    return folder / name / "version_0"


def arguments(folder, name, *more):
    logger = ("--trainer.logger.save_dir", str(folder), "--trainer.logger.name", name)
    return ["fit", "--config", "demo_ddpm", *TINY, *logger, *more]


def curve(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_a_ddpm_is_trained_and_makes_pictures(command, capsys):
    folder = fit(command.folder, "train", "--trainer.max_steps", "12")
    said = capsys.readouterr().out
    assert re.search(r"step 12 of 12: loss [\d.]+, [\d.]+ s(teps)?/s(tep)?, \d+ images/s", said)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(image.width, image.height) for image in events.Images("validation/pictures")] == [(16, 16)] * 2
    assert {"train/loss", "train/mse", "train/learning_rate", "validation/loss"} <= {*events.Tags()["scalars"]}

    made = ("--model.pretrained", str(folder / "export"), "--data.number", "5", "--data.batch_size", "2")
    logger = ("--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name", "made")
    archive = ("--trainer.callbacks", "asyncdiff_pl.callbacks.PictureArchive")
    run(with_named_configs(["predict", "--config", "demo_ddpm_pictures", *made, *logger, *archive]))
    frames = command.folder / "made" / "version_0" / "frames" / "steps=20"
    assert [file.name for file in sorted(frames.iterdir())] == [f"{number}.png" for number in range(5)]
    with np.load(command.folder / "made" / "version_0" / "pictures" / "steps=20.npz") as arrays:
        assert np.array_equal(arrays["images"][3], np.asarray(Image.open(frames / "3.png")))


def test_a_killed_run_goes_on_with_the_same_losses(command):
    process = command.start(arguments(command.folder, "killed", "--trainer.max_steps", "1000"))
    for line in process.stdout:
        if line.startswith("step 12 "):
            break
    process.send_signal(signal.SIGKILL)
    command.finish(process)
    folder = command.folder / "killed" / "version_0"
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["global_step"]
    assert step >= 10
    run(with_named_configs(["fit", "--resume", str(folder), "--trainer.max_steps", str(step + 4)]))
    whole = curve(fit(command.folder, "whole", "--trainer.max_steps", str(step + 4)))
    killed = curve(folder)
    # of steps that were made twice TensorBoard shows the later ones
    assert {at: killed[at] for at in range(step, step + 4)} == {at: whole[at] for at in range(step, step + 4)}


@pytest.mark.parametrize("name", METHODS)
def test_configs_build_what_they_name(command, monkeypatch, name):
    seen = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda trainer, model, **_: seen.append((trainer, model)))
    np.savez(command.folder / "train.npz", images=np.zeros((4, 32, 32, 3), dtype=np.uint8))
    own = ("--data.path", str(command.folder), "--trainer.accelerator", "cpu", "--trainer.precision", "32")
    run(with_named_configs(["fit", "--config", name, "--model.channels", "16", *own]))
    ((trainer, model),) = seen
    assert isinstance(model, DDPM)
    assert (type(model.timesteps), type(model.weight)) == METHODS[name]
    assert (trainer.gradient_clip_val, model.optimizer.learning_rate, model.optimizer.warm_up) == (1.0, 2e-4, 5000)
    assert trainer.loggers[0].name == name


def test_all_configs_of_training_are_seen():
    assert {*CIFAR} == {*METHODS}
    assert all(map(is_training, (*METHODS, "demo_ddpm", "train/clip")))
    assert not any(map(is_training, ("demo", "ddpm_pictures", "demo_ddpm_pictures")))


@pytest.mark.parametrize("name", [name for name in packaged_configs() if is_training(name)])
def test_a_killed_run_of_any_config_has_something_to_go_on_with(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    every = config.get("state", {}).get("every_n_steps", TrainingState().every_n_steps)
    assert every <= config["trainer"]["max_steps"] / 4
