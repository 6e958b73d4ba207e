import csv
import json

import pytest
from lightning.pytorch import Callback

from asyncdiff_pl.callbacks import FrameWriter, Results, StepLatency
from asyncdiff_pl.callbacks.sample_table import gather_parts, merge, read_table, summarise

TIMES = ("seconds", "timed", "step_latency_ms")


class Sharpness(Callback):
    """A user's own metric, computed after the batch like the package's own."""

    scorer = "sharpness by hand"

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        for prediction in outputs:
            prediction.metrics |= {"sharpness": 0.5, "score": float(len(prediction.sample.id)), "scorer": self.scorer}


def timeless(path):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_table(path)]


def test_every_sample_has_a_row_and_every_step_count_one(run, tiny_predictor, capsys):
    run([Results(), Sharpness(), StepLatency()], tiny_predictor([3, 2]))
    samples = read_table(run.folder / "samples.csv")
    assert list(samples[0]) == [*("steps", "id", "score", "seconds", "timed", "step_latency_ms", "sharpness", "scorer")]
    assert [(row["steps"], row["id"]) for row in samples] == [(n, i) for n in "23" for i in ("1", "2", "10")]
    assert [row["timed"] for row in samples] == ["True", "True", "True", "False", "True", "True"]
    assert samples[0]["scorer"] == "sharpness by hand"

    results = read_table(run.folder / "results.csv")
    assert list(results[0])[:5] == ["steps", "avg_score", "std_score", "avg_time", "std_time"]
    assert [(row["steps"], row["samples"], row["timed_samples"]) for row in results] == [
        ("2", "3", "3"),
        ("3", "3", "2"),
    ]
    assert float(results[0]["avg_score"]) == pytest.approx(4 / 3, rel=1e-5)
    assert float(results[0]["std_score"]) == pytest.approx((2 / 9) ** 0.5, rel=1e-5)
    assert float(results[1]["avg_time"]) == pytest.approx(
        sum(float(row["seconds"]) for row in samples[4:]) / 2, rel=1e-4
    )
    expected = {"model": "tiny", "weights": "pretrained", "device": "cpu", "seed": "0", "world_size": "1", "cut": ""}
    assert expected.items() <= results[0].items()
    assert not list(run.folder.glob("*.part*"))
    text = capsys.readouterr().out
    assert "1.33 ± 0.47" in text
    assert f"results: {run.folder}" in text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_its_place_among_the_callbacks_does_not_matter(run, place):
    seen = []

    class Counting(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(stage)

    callbacks = [Counting(), Sharpness()]
    callbacks.insert(place, Results())
    run(callbacks)
    assert seen == ["predict"]
    assert isinstance(run.trainer.callbacks[-1], Results)
    assert all(row["sharpness"] == "0.5" for row in read_table(run.folder / "samples.csv"))


def test_a_run_that_died_goes_on_and_makes_nothing_twice(run, tiny_predictor, tmp_path):
    ids = ("1", "2", "3", "4", "5")
    whole = type(run)(tmp_path / "whole")
    whole([Results(), Sharpness()], ids=ids)

    dying = tiny_predictor(fail_at="4")
    with pytest.raises(RuntimeError):
        run([Results(), Sharpness()], dying, ids=ids)
    assert dying.made == [(2, "1"), (2, "2"), (2, "3")]
    assert len(read_table(run.folder / "samples.part0.csv")) == 3
    with (run.folder / "samples.part0.csv").open("a") as file:
        file.write("2,4,0.")  # what a kill in the middle of a row leaves

    run([Results(), Sharpness()], ids=ids)
    assert run.module.made == [(2, "4"), (2, "5")]
    assert timeless(run.folder / "samples.csv") == timeless(whole.folder / "samples.csv")
    assert read_table(run.folder / "results.csv")[0]["samples"] == "5"
    assert not list(run.folder.glob("*.part*"))


def test_a_finished_run_keeps_its_results_and_takes_more_samples(run, tiny_predictor):
    class Memory(Callback):
        def __init__(self, gib):
            self.run_metrics = {"peak_memory_gib": gib}

    run([Results(), Memory(7.0)])
    first = read_table(run.folder / "results.csv")
    run([Results(), Memory(1.0)])
    assert run.module.made == []
    assert read_table(run.folder / "results.csv") == first
    run([Results(), Memory(2.0)], tiny_predictor([2, 3]), ids=("1", "2", "10", "11"))
    assert run.module.made == [(2, "11"), (3, "1"), (3, "2"), (3, "10"), (3, "11")]
    assert [row["samples"] for row in read_table(run.folder / "results.csv")] == ["4", "4"]


@pytest.mark.parametrize(
    ("module", "data", "name"),
    [({"seed": 1}, {}, "seed 0"), ({"num_frames": 4}, {}, "num_frames 3"), ({}, {"colour": "red"}, "colour 'green'")],
)
def test_other_settings_are_refused(run, tiny_predictor, module, data, name):
    run([Results()])
    before = (run.folder / "samples.csv").read_text()
    with pytest.raises(ValueError, match=name) as error:
        run([Results()], tiny_predictor(**module), ids=("1", "2", "10", "11"), **data)
    assert "log folder" in str(error.value)
    assert (run.folder / "samples.csv").read_text() == before


def test_settings_that_a_strategy_knows_late_are_refused_before_any_sample(run, monkeypatch):
    def describe(cut):
        return lambda self: {"strategy": "cutting", "cut": cut if self.lightning_module._pipeline else None}

    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "describe", describe("abc"), raising=False)
    run([Results()])
    assert read_table(run.folder / "results.csv")[0]["cut"] == "abc"
    assert json.loads((run.folder / "settings.json").read_text())["cut"] == "abc"
    monkeypatch.setattr(SingleDeviceStrategy, "describe", describe("def"))
    with pytest.raises(ValueError, match="cut 'abc'"):
        run([Results()], ids=("11",))
    assert run.module.made == []


def test_an_interrupted_run_says_how_to_go_on(run, tiny_predictor, capsys):
    with pytest.raises(SystemExit):
        run([Results()], tiny_predictor(fail_at="10", error=KeyboardInterrupt))
    assert f"--resume {run.folder}" in capsys.readouterr().out


def test_without_timed_samples_the_time_cells_are_empty(run, caplog):
    run([Results(), StepLatency()], ids=("1",))
    (row,) = read_table(run.folder / "results.csv")
    assert row["samples"] == "1"
    assert row["avg_time"] == row["std_time"] == row["avg_score"] == row["avg_step_latency_ms"] == ""
    assert "no sample was timed (a process's first call is not, nor is the first of each shape" in caplog.text


def test_a_row_is_there_only_after_its_frames(run, tiny_predictor):
    with pytest.raises(RuntimeError):
        run([Results(), FrameWriter(animation="none")], tiny_predictor(fail_at="10"))
    ids = [row["id"] for row in read_table(run.folder / "samples.part0.csv")]
    assert ids == ["1", "2"]
    assert all((run.folder / "frames" / "steps=2" / name / "0002.png").exists() for name in ids)


def test_rows_merge_by_key_and_sort_by_steps_then_number_then_text():
    rows = [{"steps": steps, "id": name} for steps, name in [("25", "b"), ("25", "10"), ("5", "a"), ("25", "9")]]
    again = {"steps": "25", "id": "9", "score": "1"}
    merged = merge(rows, [again])
    assert [(row["steps"], row["id"]) for row in merged] == [("5", "a"), ("25", "9"), ("25", "10"), ("25", "b")]
    assert merged[1] is again


def test_parts_of_any_number_of_groups_are_put_together(tmp_path):
    for group, names in enumerate((["1", "4"], ["2"], ["3", "5"])):
        with (tmp_path / f"samples.part{group}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["steps", "id", "seconds", "timed"], lineterminator="\n")
            table.writeheader()
            table.writerows({"steps": 2, "id": name, "seconds": 1.0, "timed": True} for name in names)
    assert [row["id"] for row in gather_parts(tmp_path)] == ["1", "2", "3", "4", "5"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.csv"]
    assert summarise(read_table(tmp_path / "samples.csv"))[2]["avg_time"] == "1"
