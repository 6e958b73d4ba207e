"""Runs that are parallel in time through the command line: what they write, and one begun with another's states."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import with_named_configs

STRATEGY = "--trainer.strategy.init_args."
SMALL = ("--model.num_inference_steps", "5", "--model.height", "32", "--model.width", "32", "--trainer.devices", "1")


@pytest.fixture
def here(command):
    """Runs a config at a small size, within this process that plays both ranks."""
    logger = ["--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name"]
    arguments = [*SMALL, STRATEGY + "simulate", "true"]
    return lambda config, name, *more: run(
        with_named_configs(["predict", "--config", config, *arguments, *logger, name, *more])
    )


def test_what_runs_write(command, here):
    here("demo_parataa", "first", STRATEGY + "tolerance", "0", "--data.batch_size", "2", "--solver.sheets", "1")
    log = command.log("first")
    (result,) = log.table("results.csv")
    described = [result[name] for name in ("strategy", "method", "ranks", "memory", "tolerance", "avg_iterations")]
    assert described == ["time", "triangular_anderson", "2", "2", "0", "4"]
    # the first step, then 4 + 3 + 2 + 1 states
    told = [(row["iterations"], row["denoiser_calls"], row["unfinished_states"]) for row in log.table("samples.csv")]
    assert told == [("4", "11", "0")] * 2
    iterations = log.table("iterations.csv")
    assert [row["evaluated"] for row in iterations] == ["4", "3", "2", "1"] * 2
    assert [row["residual"] for row in iterations][3::4] == [row["residual"] for row in log.table("samples.csv")]
    events = EventAccumulator(str(log.path)).Reload()
    assert not list(log.path.glob("*.part*.csv"))
    assert [event.value for event in events.Scalars("solver/iterations/steps=5")] == [4, 4]
    assert [event.step for event in events.Scalars("solver/residual/steps=5")] == [1, 2, 3, 4]

    (sheet,) = (log.path / "iterations" / "steps=5").iterdir()
    with Image.open(sheet) as picture:
        assert sheet.name == "1.png"
        # titles, and four iterations with a text above each
        assert picture.height == 22 + 4 * (22 + 32) + 3 * 2
        row = np.asarray(picture.convert("RGB")).astype(int)[-32:]
    with Image.open(log.path / "frames" / "steps=5" / "1.png") as picture:
        result = np.asarray(picture.convert("RGB"))
    # the last row ends with the result
    places = range(row.shape[1] * 3 // 4, row.shape[1] - 31)
    assert min(np.abs(row[:, at : at + 32] - result).max() for at in places) <= 1

    path = log.path / "trajectories" / "steps=5" / "1.safetensors"
    with safe_open(path, "pt") as file:
        states, metadata = file.get_tensor("states"), file.metadata()
    assert len(states) == 6
    assert (metadata["steps"], metadata["scheduler"]) == ("5", "DDIMScheduler")
    assert len(json.loads(metadata["timesteps"])) == 5

    # what one step after the other came to is there at once, and others take what they begin with
    plain = ["predict", "--config", "demo_parataa", "--trainer.strategy", "auto", *SMALL]
    run(
        with_named_configs([*plain, "--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name", "plain"])
    )
    place = command.log("plain").path / "trajectories"
    with safe_open(place / "steps=5" / "1.safetensors", "pt") as file:
        assert torch.allclose(file.get_tensor("states"), states, atol=1e-3)
    beginning = (STRATEGY + "initial_trajectory", str(place), STRATEGY + "variation_steps", "null")
    here("demo_from_trajectory", "again", *beginning)
    assert [row["iterations"] for row in command.log("again").table("samples.csv")] == ["1", "1"]
    beginning = (STRATEGY + "initial_trajectory", str(path), STRATEGY + "variation_steps", "2")
    here("demo_from_trajectory", "others", *beginning, "--trajectories.save", "true")
    with safe_open(command.log("others").path / "trajectories" / "steps=5" / "2.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("states")[2:4], states[2:4])
    more = (STRATEGY + "variation_steps", "4", *SMALL[:1], "4")
    with pytest.raises(ValueError, match=r"holds no version_0/trajectories/steps=4/1.safetensors: give the log folder"):
        here("demo_from_trajectory", "fewer", STRATEGY + "initial_trajectory", str(log.path), *more)


@pytest.mark.parametrize(
    ("config", "more", "sentence"),
    [
        (
            "demo_from_trajectory",
            (STRATEGY + "initial_trajectory", ".", STRATEGY + "variation_steps", "6"),
            "variation_steps is 6; give one from 1 to the number of steps, 5",
        ),
        (
            "demo_image",
            ("--solver.sheets", "1"),
            "solver.sheets is 1, but AsyncDiffStrategy has no iterations to draw: take TimeParallelStrategy",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(here, config, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        here(config, "none", *more)


def test_a_dry_run_does_not_guess_at_iterations(command, here, capsys):
    with pytest.raises(SystemExit):
        here("demo_parataa", "dry", "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["time"].startswith("not known before a run")
    assert "method triangular_anderson" in lines["ranks"]
