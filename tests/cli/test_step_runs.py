"""Runs with several steps at a time through the command line: what they write, what they foresee."""

import pytest

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import with_named_configs

STRATEGY = "--trainer.strategy.init_args."
SMALL = ("--model.num_inference_steps", "6", "--model.num_frames", "2", "--data.height", "64", "--data.width", "64")
SIMULATED = ("--trainer.devices", "1", STRATEGY + "simulate", "true", "--data.max_images", "1")


@pytest.fixture
def here(command):
    """Runs `predict --config demo_steps` at a small size, within this process."""
    logger = ["--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name"]
    return lambda name, *more: run(
        with_named_configs(["predict", "--config", "demo_steps", *SMALL, *logger, name, *more])
    )


def test_what_a_run_writes(command, here):
    here("run", *SIMULATED, STRATEGY + "steps", "3", STRATEGY + "warm_up", "1", STRATEGY + "cfg", "2")
    log = command.log("run")
    (result,) = log.table("results.csv")
    described = [result[name] for name in ("steps", "strategy", "parallel_steps", "warm_up", "cfg", "simulate")]
    assert described == ["6", "steps", "3", "1", "2", "True"]
    assert [row["exact_steps"] for row in log.table("samples.csv")] == ["1"]
    # a step's estimate goes from each of the two halves' ranks to two others: 2 halves, 2 frames, 4 channels
    rows = columns = 64 // 4
    assert float(result["mib_per_step"]) == pytest.approx(2 * 2 * (2 * 2 * 4 * rows * columns * 4) / 2**20, rel=1e-3)


def test_a_dry_run_tells_what_is_exact(command, here, capsys):
    for steps in ("1", "4"):
        with pytest.raises(SystemExit):
            here("dry", "--trainer.devices", steps, STRATEGY + "steps", steps, STRATEGY + "warm_up", "1", "--dry-run")
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines.get("exact") == {"1": None, "4": "2 of 6 steps of a sample"}[steps]
        assert "denoiser" in lines["time"]
