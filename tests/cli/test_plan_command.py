"""`plan` as a user calls it, within this process: no rank, no weight and no GPU."""

import csv

import pytest

from asyncdiff_pl.cli.overview import overview, with_named_configs
from asyncdiff_pl.cli.plan import run_plan
from asyncdiff_pl.models.base import DiffusionPredictor

SMALL = ("--data.height", "64", "--data.width", "64", "--model.num_frames", "2", "--model.num_inference_steps", "4")


@pytest.fixture
def plan(command, monkeypatch, capsys):
    """What `plan` prints; a weight that is loaded would be an error."""
    monkeypatch.setattr(DiffusionPredictor, "configure_model", None)

    def describe(*arguments, config="demo"):
        run_plan(with_named_configs(["plan", "--config", config, *SMALL, *arguments])[1:])
        return capsys.readouterr().out

    return describe


def test_a_config_of_gpus_that_are_not_here(plan, tmp_path):
    path = tmp_path / "plan.csv"
    out = plan(
        *("--trainer.accelerator", "gpu", "--trainer.devices", "4", "--trainer.num_nodes", "8"),
        *("--link", "pcie", "--step_ms", "3", "--csv", str(path)),
    )
    assert "32 GPUs on 8 machines of 4" in out
    assert "20 GB/s where ranks wait" in out
    assert sum(line.startswith("* ") for line in out.splitlines()) == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["gpus"], row["nodes"]) for row in rows} == {("32", "8")}
    # pipelines of up to 4 ranks
    assert {row["data"] for row in rows} == {"32", "16", "8"}


def test_numbers_of_gpus_and_another_strategy(plan):
    out = plan("--gpus", "2", "3", "--bandwidth", "50", "--trainer.strategy", "steps")
    assert "50 GB/s where ranks wait, 50 beside" in out
    assert [line for line in out.splitlines() if line.endswith("GPUs")] == ["2 GPUs", "3 GPUs"]
    assert [line.split("  ")[0] for line in out.splitlines() if line[:2] == "* "] == ["* 2 steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "2", "two"), "^gpus is two; give numbers from 1 up"),
        (("--trainer.devices", "auto"), "^trainer.devices is auto, which does not say how many GPUs there are"),
        (("--link", "ethernet"), "^link is ethernet; give nvlink or pcie, or a bandwidth in GB/s"),
        (("--bandwidth", "0"), "^bandwidth is 0.0 GB/s; give a number above 0"),
        (("--step_ms", "-1"), "^step_ms is -1.0; give a number of milliseconds above 0"),
        (("--trainer.strategy", "Patches"), "^trainer.strategy is Patches, which is no strategy's name: give Async"),
        (("--data.height", "70"), "^data.height is 70 pixels; the model takes multiples of"),
        (("--trainer.strategy.stages", "9"), "stages is 9; it must be from 1 to 8"),
        (("--trainer.devices", "3", "--gpus", "3", "--trainer.num_nodes", "2"), "^3 GPUs cannot be shared out evenly"),
    ],
)
def test_bad_input_is_told_in_a_sentence(plan, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        plan(*arguments)
    assert "\n" not in str(error.value)


def test_help(capsys):
    run_plan(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("gpus", "link", "bandwidth", "step_ms", "csv", "trainer.num_nodes"))
    assert "plan --help" in overview()


def test_a_config_for_training_is_refused():
    with pytest.raises(ValueError, match="is a config of `fit`"):
        with_named_configs(["plan", "--config", "train/clip"])
