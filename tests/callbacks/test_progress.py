import io
import sys

import pytest
from lightning.pytorch import Callback

from asyncdiff_pl.callbacks import DiffusionProgressBar, Results, progress
from asyncdiff_pl.callbacks.progress import Measured, Pace

NOTHING = Measured(0, 0, 0, 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_one_line_a_sample(run, capsys):
    run([DiffusionProgressBar()], bar=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps)" in line]
    assert [line.split(":")[0] for line in lines] == ["1/3 1 (2 steps)", "2/3 2 (2 steps)", "3/3 10 (2 steps)"]
    assert "ms a step" in lines[0]
    assert "left" in lines[0]
    assert "left" not in lines[2]


def test_a_terminal_shows_the_step_in_work_and_the_time_left(run, tiny_predictor, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run([DiffusionProgressBar(refresh_seconds=0)], tiny_predictor(4), bar=True)
    text = terminal.getvalue()
    assert "step 3/4" in text
    assert "ms a step" in text
    assert "00:00 left" in text
    assert "3/3" in text
    assert "(4 steps)" not in text


class Solver(Callback):
    def on_predict_batch_end(self, trainer, *_):
        trainer.progress_bar_callback.tell("iteration 3")


def test_a_long_step_is_told_without_times_that_nobody_knows(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run([DiffusionProgressBar(refresh_seconds=0), Solver()], bar=True)
    assert "iteration 3]" in terminal.getvalue()
    # and is not in the way of a log file
    monkeypatch.setattr(sys, "stdout", log := io.StringIO())
    run([DiffusionProgressBar(refresh_seconds=0), Solver()], bar=True)
    assert "iteration 3" not in log.getvalue()


class Late:
    """A device that is through with all steps of a sample long after the CPU launched them."""

    steps = 0

    def __init__(self, device):
        pass

    def mark(self):
        Late.steps += 1
        return Late.steps

    def is_past(self, mark):
        return Late.is_done

    def milliseconds(self, start, end):
        return 5000.0 * (end - start)


def test_steps_that_the_device_is_not_through_with_do_not_count(run, tiny_predictor, monkeypatch):
    terminal, module = Terminal(), tiny_predictor(4)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(progress, "Clock", Late)
    generate = module.generate

    def slow(*args):
        Late.is_done = False
        frames = generate(*args)
        Late.is_done = True
        return frames

    module.generate = slow
    run([DiffusionProgressBar(refresh_seconds=0)], module, ids=("1", "2", "3"), bar=True)
    text = terminal.getvalue()
    assert "step 1/4" not in text
    assert "step 4/4" in text
    # two more samples of four steps, after the first
    assert "1/3" in text
    assert "5.00 s a step, 00:40 left" in text


def test_a_run_that_goes_on_counts_what_is_left(run, tiny_predictor, capsys):
    with pytest.raises(RuntimeError):
        run([DiffusionProgressBar(), Results()], tiny_predictor(fail_at="2"), bar=True)
    capsys.readouterr()
    run([DiffusionProgressBar(), Results()], bar=True)
    text = capsys.readouterr().out
    assert "1/2 2 (2 steps)" in text
    assert "2/2 10 (2 steps)" in text
    run([DiffusionProgressBar(), Results()], bar=True)


@pytest.mark.parametrize(
    ("planned", "done", "running", "left"),
    [
        ([[4], [4]], [], NOTHING, None),
        ([[4], [4]], [], Measured(0, 2, 1.0, 0), 3.0),
        ([[4], [4]], [Measured(1, 4, 2.0, 3.0)], NOTHING, 5.0),
        # the first batch's one-time work is left out, and step counts differ
        ([[4], [4], [8], [8]], [Measured(1, 4, 90.0, 9.0), Measured(1, 4, 2.0, 3.0)], NOTHING, 14.0),
        ([[4], [4], [8]], [Measured(1, 4, 90.0, 9.0), Measured(1, 4, 2.0, 3.0)], Measured(0, 6, 3.0, 0), 4.0),
        # samples of one step count share a call
        ([[4, 4], [4, 4]], [Measured(2, 4, 2.0, 1.0)], NOTHING, 3.0),
        ([[4]], [Measured(1, 4, 2.0, 1.0)], NOTHING, 0.0),
    ],
)
def test_the_time_left_counts_steps_and_what_is_between(planned, done, running, left):
    pace = Pace(planned)
    for batch in done:
        pace.finish(batch)
    assert pace.left(running) == (left if left is None else pytest.approx(left))
