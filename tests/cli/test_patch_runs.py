"""Runs in patches through the command line: what they write, what they go on with, and what is wrong input."""

import numpy as np
import pytest
from PIL import Image

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import with_named_configs
from asyncdiff_pl.strategies.launcher import GroupLauncher

STRATEGY = "--trainer.strategy.init_args."
SMALL = ("--model.num_inference_steps", "5", "--model.height", "64", "--model.width", "64", "--data.max_prompts", "2")
ALONE = ("--trainer.devices", "1")
SIMULATED = (*ALONE, STRATEGY + "simulate", "true")
ASYNCHRONOUS = (STRATEGY + "mode", "corrected_async_gn", STRATEGY + "portion", "0.5", STRATEGY + "warm_up", "2")


@pytest.fixture
def arguments(command):
    """`predict --config demo_patch` at a small size, below the command's folder."""
    logger = ["--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name"]
    return lambda name, *more: ["predict", "--config", "demo_patch", *SMALL, *logger, name, *more]


@pytest.fixture
def here(arguments):
    """Runs it within this process."""
    return lambda name, *more: run(with_named_configs(arguments(name, *more)))


def pictures(log):
    frames = log.path / "frames"
    return np.array([np.asarray(Image.open(frames / name)).astype(int) for name in sorted(log.pictures())])


def test_two_ranks_make_what_one_process_simulates(command, arguments, here):
    outcome = command.finish(command.start(arguments("ranks", *ASYNCHRONOUS)))
    assert outcome.status == 0, outcome.err
    assert command.processes_left() == []
    here("simulated", *ASYNCHRONOUS, *SIMULATED)
    ranks, simulated = command.log("ranks"), command.log("simulated")
    assert np.abs(pictures(ranks) - pictures(simulated)).max() <= 1
    (result,) = ranks.table("results.csv")
    described = [result[name] for name in ("strategy", "patches", "mode", "warm_up", "portion", "cfg", "world_size")]
    assert described == ["patches", "2", "corrected_async_gn", "2", "0.5", "1", "2"]
    assert {row["exact_steps"] for row in ranks.table("samples.csv")} == {"2"}
    # one process counts what all ranks would have sent, but for the estimates: they are whole there
    (other,) = simulated.table("results.csv")
    assert 0 < float(other["mib_per_step"]) < float(result["mib_per_step"]) < 1.1 * float(other["mib_per_step"])


def test_less_is_sent_with_a_smaller_portion_and_most_where_all_is_exact(command, here):
    sent = {}
    for name, more in {
        "exact": (STRATEGY + "mode", "full_sync"),
        "all": (STRATEGY + "portion", "1"),
        "none": (STRATEGY + "portion", "0"),
        "naive": (STRATEGY + "mode", "naive"),
    }.items():
        here(
            name, *SIMULATED, STRATEGY + "warm_up", "2", *more, "--clip_score.model", "null", "--data.max_prompts", "1"
        )
        (result,) = command.log(name).table("results.csv")
        sent[name] = float(result["mib_per_step"])
    assert sent["exact"] >= sent["all"] > 2 * sent["none"] > sent["naive"] == 0


def test_exact_patches_are_one_rank(command, here):
    here("patches", *SIMULATED, STRATEGY + "mode", "full_sync", "--clip_score.model", "null")
    here("one", *ALONE, STRATEGY + "patches", "1", "--clip_score.model", "null")
    assert np.abs(pictures(command.log("patches")) - pictures(command.log("one"))).max() <= 1


def test_a_run_goes_on_with_its_own_settings_alone(command, here, capsys):
    here("run", *SIMULATED, *ASYNCHRONOUS, "--data.max_prompts", "1", "--clip_score.model", "null")
    folder = str(command.log("run").path)
    for setting, value in (("portion", "0.3"), ("mode", "stale_gn"), ("patches", "3")):
        with pytest.raises(ValueError, match=rf"has {setting} .* but this one has .*: give the same to go on with it"):
            run(with_named_configs(["predict", "--resume", folder, STRATEGY + setting, value]))
    run(with_named_configs(["predict", "--resume", folder, "--data.max_prompts", "2"]))
    assert [row["id"] for row in command.log("run").table("samples.csv")] == ["1", "2"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((STRATEGY + "patches", "3"), "cfg 1 x patches 3 = 3 ranks does not fit 2 ranks: start a multiple of 3, or"),
        (
            ("--trainer.devices", "5", STRATEGY + "patches", "5"),
            "5 patches do not fit 16 rows of latents: each takes a multiple of 4 rows, so that at most 4 fit",
        ),
        ((STRATEGY + "mode", "corected"), "trainer.strategy.mode is corected; it must be full_sync, .* or naive.$"),
        ((STRATEGY + "portion", "2"), "portion is 2.0; give a share of the neighbours' rows from 0 to 1"),
        (
            (STRATEGY + "mode", "full_sync", STRATEGY + "portion", "0.3"),
            "mode full_sync computes exactly, and portion 0.3 is for modes with stale rows: take portion 1",
        ),
        ((STRATEGY + "stages", "2"), "There is no setting trainer.strategy.stages"),
    ],
)
def test_wrong_input_is_told_before_any_rank_starts(here, command, monkeypatch, more, sentence):
    monkeypatch.setattr(GroupLauncher, "launch", None)
    with pytest.raises(ValueError, match=sentence) as error:
        here("bad", *more)
    assert "\n" not in str(error.value)
    assert not list(command.folder.iterdir())


def test_a_dry_run_tells_the_rows_of_each_patch(here, capsys):
    with pytest.raises(SystemExit) as end:
        here("dry", "--trainer.devices", "3", STRATEGY + "patches", "3", "--dry-run")
    assert end.value.code == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["cut"] == "patches of 8, 4, 4 of the latents' 16 rows"
