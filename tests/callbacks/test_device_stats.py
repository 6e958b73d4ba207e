import csv

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from asyncdiff_pl.callbacks import DeviceStats, Results, Traffic
from asyncdiff_pl.callbacks.sample_table import read_table


def test_each_rank_has_a_row_with_its_memory(run):
    run([Results(), DeviceStats()])
    with (run.folder / "devices.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["rank"], row["device"], row["memory"]) == ("0", "cpu", "resident in the process")
    assert 0.05 < float(row["peak_memory_gib"]) < 100
    assert row["utilisation_percent"] == ""
    (result,) = read_table(run.folder / "results.csv")
    assert result["peak_memory_gib"] == row["peak_memory_gib"]
    assert run.events().Scalars("resident_memory_gib/rank0")[0].value == pytest.approx(
        float(row["peak_memory_gib"]), 1e-4
    )


def test_a_strategy_that_exchanges_nothing_has_no_traffic(run):
    run([Results(), Traffic()])
    assert read_table(run.folder / "results.csv")[0]["mib_per_step"] == "0"


def test_traffic_is_what_the_strategy_counts_per_step(run, monkeypatch):
    counted = {"sent_bytes": 6 * 2**20, "steps": 4}
    monkeypatch.setattr(SingleDeviceStrategy, "traffic", lambda self: counted, raising=False)
    run([Traffic(), Results()])
    assert read_table(run.folder / "results.csv")[0]["mib_per_step"] == "1.5"
    assert run.events().Scalars("traffic_mib_per_step/pipeline")[0].value == 1.5
