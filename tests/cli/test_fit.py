"""`fit` as a user runs it: help, bad input, a run that is stopped and goes on, on one rank and on two."""

import contextlib
import io
import os
import re
import signal
import time

import pytest
import torch
from diffusers import AutoencoderKL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.help import settings_parser
from asyncdiff_pl.cli.overview import packaged_configs, with_named_configs
from asyncdiff_pl.cli.parser import TRAINING_SETTINGS

CONFIG = "train/image_autoencoder"
SMALL = (
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.enable_model_summary", "false"),
    *("--data.size", "32", "--data.batch_size", "2", "--data.num_workers", "0", "--data.validation_batches", "2"),
    *("--trainer.val_check_interval", "20", "--trainer.log_every_n_steps", "1", "--progress_bar.line_seconds", "0"),
)


def arguments(folder, *more, config=CONFIG):
    logger = ("--trainer.logger.save_dir", str(folder), "--trainer.logger.name", "run")
    return ["fit", "--config", config, *SMALL, *logger, *more]


def fit(*given):
    run(with_named_configs([*given]))


def curve(folder, name):
    """Steps and values that TensorBoard shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_leaves_curves_pictures_a_state_and_weights(command):
    fit(*arguments(command.folder, "--trainer.max_steps", "40"))
    folder = command.folder / "run" / "version_0"
    loss = curve(folder, "train/loss")
    assert [step for step, _ in loss] == list(range(40))
    assert loss[-1][1] < 0.8 * loss[0][1]
    assert [step for step, _ in curve(folder, "validation/psnr")] == [19, 39]
    rates = [value for _, value in curve(folder, "train/learning_rate")]
    assert rates == sorted(rates)  # still warming up
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["validation/pictures"]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    assert state["global_step"] == 40
    exported = AutoencoderKL.from_pretrained(folder / "export")
    assert exported.config.scaling_factor != 0.18215
    # the export holds the average, not the last weights
    name = "network.decoder.conv_in.weight"
    average, last = state["state_dict"][name], state["current_model_state"][name]
    assert torch.equal(exported.state_dict()["decoder.conv_in.weight"].half(), average.half())
    assert not torch.equal(average, last)


@pytest.mark.parametrize("config", [name for name in packaged_configs() if name.startswith("train/")])
def test_every_config_builds_what_it_names(command, monkeypatch, config):
    class Built(Exception):
        pass

    def stop(*_, **__):
        raise Built

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", stop)
    with pytest.raises(Built):
        fit(*arguments(command.folder, config=config))


@pytest.mark.parametrize(
    ("number", "status", "ranks"),
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)],
    ids=["Ctrl-C", "SIGTERM to one of 2 ranks"],
)
def test_a_stopped_run_goes_on(command, capsys, number, status, ranks):
    is_terminal = number == signal.SIGINT
    # a terminal sends its signal to data workers too
    several = ("--trainer.devices", str(ranks), "--trainer.strategy", "ddp")
    several = ("--data.num_workers", "1") if is_terminal else several
    process = command.start(
        arguments(command.folder, "--trainer.max_steps", "1000", "--model.optimizer.warm_up", "5", *several)
    )
    for line in process.stdout:
        if line.startswith("step 20 "):
            break
    if is_terminal:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    sent = time.monotonic()
    stopped = command.finish(process)
    assert time.monotonic() - sent < 10
    assert stopped.status == status, stopped.err
    assert not stopped.own_tracebacks
    assert "leaked" not in stopped.err
    folder = command.folder / "run" / "version_0"
    step = int(re.search(r"state saved after step (\d+); `fit --resume", stopped.out)[1])
    assert 20 <= step < 1000
    assert not (folder / "export").exists()
    assert command.processes_left() == []

    end = step + 5
    more = ["fit", "--resume", str(folder), "--trainer.max_steps", str(end)]
    if ranks == 1:
        fit(*more, "--data.num_workers", "0")
        said = capsys.readouterr().out
    else:
        outcome = command.finish(command.start(more))
        assert outcome.status == 0, outcome.err
        said = outcome.out
    assert f"step {step + 1} of {end}: " in said
    assert f"step {step} of {end}: " not in said
    assert (folder / "export" / "config.json").is_file()
    loss = curve(folder, "train/loss")
    # Lightning logs a step after its end, which the last one before the stop has not reached
    assert [at for at, _ in loss] == [at for at in range(end) if at != step - 1]
    # it goes on from what was learned; how much that is depends on how soon the stop came
    assert sum(value for _, value in loss[-5:]) < 0.9 * sum(value for _, value in loss[:5])
    assert list(folder.parent.iterdir()) == [folder]


PREDICTS = '{"class_path": "asyncdiff_pl.strategies.AsyncDiffStrategy"}'

CASES = {
    "steps": (["--trainer.max_steps", "-1"], "trainer.max_steps is -1; give the number of training steps"),
    "devices": (["--trainer.devices", "x"], "trainer.devices is x; give a number"),
    "architecture": (["--model.architecture", "none"], "none is no folder with a config.json; give one, or one of"),
    "batch": (["--data.batch_size", "0"], "data.batch_size is 0; give a number from 1 up"),
    "no number": (["--data.batch_size", "x"], "^data.batch_size is x; it must be int.$"),
    "decay": (["--average.decay", "2"], "decay is 2.0; give a number from 0 to below 1"),
    "option": (["--no_such", "1"], "^There is no setting --no_such; `fit --help` explains all settings.$"),
    "model's option": (["--model.clip", "x"], "^There is no setting model.clip; `fit --help` explains all settings.$"),
    "resume": (["--resume", "."], "holds no checkpoints/last.ckpt: nothing was saved"),
    "strategy": (
        ["--trainer.strategy", PREDICTS],
        "AsyncDiffStrategy, which only predicts; take auto",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_told_in_one_sentence(command, given, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        fit(*arguments(command.folder, *given))
    assert "\n" not in str(error.value)
    assert not list(command.folder.iterdir())


def test_help_explains_every_setting(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.argv", ["asyncdiff_pl"])
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        run(["fit", "--help"])
    text = out.getvalue()
    assert text.startswith("usage: python -m asyncdiff_pl fit --config CONFIG")
    # sections of classes that may stand in a first one's place, which explain what is alike once more
    text = re.sub(r"^(model: DDPM|data: Cifar10)\n.*?(?=^\w+: )", "", text, flags=re.MULTILINE | re.DOTALL)
    for place, kind in TRAINING_SETTINGS.items():
        for name, default in settings_parser(place, kind).get_defaults().get(place).items():
            entries = re.findall(rf"^  --{place}.{name} (.*?)(?=^  --|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
            assert len(entries) == 1, (place, name)
            explained = "".join(entries[0].split())
            assert f"default:{'null' if default is None else default}" in explained, (place, name)
            assert len(explained) > 35, (place, name)
    for option in ("--resume FOLDER", "--seed_everything", "--trainer.max_steps", "train/tiny_svd"):
        assert option in text
    assert "svd_n2" not in text
