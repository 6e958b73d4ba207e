import csv

import numpy as np
import pytest

from asyncdiff_pl.callbacks import Results, StepLatency
from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.callbacks.step_latency import Moments, assign, curve, write_curves
from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import Prediction


def predictions(*calls):
    return [Prediction(Sample(str(index)), 4, [], 1.0, True, call) for index, call in enumerate(calls)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_timed_sample_counts_in_every_step(run, tiny_predictor, batch_size):
    run([Results(), StepLatency()], tiny_predictor([4, 2]), ids=("1", "2", "3", "4"), batch_size=batch_size)
    with (run.folder / "latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["step"]) for row in rows] == [("2", "0"), ("2", "1")] + [("4", str(i)) for i in range(4)]
    # the first call of a process is not timed
    assert [row["count"] for row in rows] == 2 * ["4"] + 4 * [str(4 - batch_size)]
    assert all(float(row["mean_ms"]) > 0 for row in rows)
    for row in read_table(run.folder / "samples.csv"):
        in_steps = int(row["steps"]) * float(row["step_latency_ms"])
        call = 1000 * float(row["seconds"]) * batch_size
        assert 0 < in_steps < call


def test_tensorboard_has_histograms_calls_and_the_curve(run, tiny_predictor):
    run([StepLatency()], tiny_predictor(3))
    events = run.events()
    histograms = events.Histograms("step_latency_ms/steps=3")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [(1, 3), (2, 3)]
    assert [event.step for event in events.Scalars("call_seconds/steps=3")] == [1, 2]
    assert [event.step for event in events.Scalars("step_latency_ms/curve/steps=3")] == [0, 1, 2]


def test_a_failing_run_leaves_the_trajectory_alone(run, tiny_predictor):
    module = tiny_predictor(fail_at="2")
    with pytest.raises(RuntimeError):
        run([StepLatency()], module)
    assert module.trajectory._listeners == []


@pytest.mark.parametrize(
    ("calls", "num_runs", "expected"),
    [
        ((0,), 1, ["0"]),
        ((0, 0), 1, ["01"]),
        ((0, 0), 2, ["0", "1"]),
        ((0, 0, 1), 2, ["01", "2"]),
        # the first and the last sample share a call, which ran first
        ((0, 1, 0), 2, ["02", "1"]),
        ((0, 0, 1), 3, ["0", "1", "2"]),
        ((0, 0), 3, []),
        ((), 0, []),
    ],
)
def test_runs_of_the_pipeline_go_to_their_samples(calls, num_runs, expected):
    found = assign(predictions(*calls), [[float(run)] for run in range(num_runs)])
    assert ["".join(p.sample.id for p in group) for group, _ in found] == expected
    assert [times for _, times in found] == [[float(run)] for run in range(len(found))]


def test_later_runs_add_to_the_curve(tmp_path):
    times = np.random.default_rng(0).uniform(1, 9, (7, 2)).tolist()
    path = tmp_path / "latency.csv"
    write_curves(path, {2: curve(times[:3])})
    write_curves(path, {2: curve(times[3:]), 1: [Moments(1, 5.0, 0.0)]})
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["step"], row["count"]) for row in rows] == [
        ("1", "0", "1"),
        ("2", "0", "7"),
        ("2", "1", "7"),
    ]
    assert [float(row["mean_ms"]) for row in rows[1:]] == pytest.approx(np.mean(times, 0), rel=1e-4)
    assert [float(row["std_ms"]) for row in rows[1:]] == pytest.approx(np.std(times, 0), rel=1e-4)


def test_a_run_that_goes_on_goes_on_counting(run, tiny_predictor):
    with pytest.raises(RuntimeError):
        run([Results(), StepLatency()], tiny_predictor(fail_at="10"))
    run([Results(), StepLatency()], ids=("1", "2", "10", "11", "12"))
    # x: 0 to 4 for five samples; the first of each process is not timed
    assert [event.step for event in run.events().Scalars("call_seconds/steps=2")] == [1, 3, 4]
