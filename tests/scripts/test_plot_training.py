import math

import pytest

pytest.importorskip("matplotlib")
from plot_training import final_values, plot, read_run
from torch.utils.tensorboard import SummaryWriter


def write(folder, values, wall_time):
    with SummaryWriter(str(folder)) as writer:
        for step, value in values.items():
            writer.add_scalar("train/loss", value, step, walltime=wall_time + step)
            writer.add_scalar("train/learning_rate", 1e-4, step, walltime=wall_time + step)


def test_a_run_that_was_continued_is_one_curve(tmp_path):
    write(tmp_path / "version_0", {0: 9.0, 10: 5.0, 20: 4.0, 25: 3.9}, wall_time=1e9)
    write(tmp_path / "version_1", {20: 3.0, 30: 2.0}, wall_time=2e9)
    assert read_run(tmp_path).curves["train/loss"] == {0: 9.0, 10: 5.0, 20: 3.0, 30: 2.0}


def test_a_run_that_began_anew_counts_alone(tmp_path):
    write(tmp_path / "version_0", {0: 9.0, 10: 5.0}, wall_time=1e9)
    write(tmp_path / "version_1", {0: 8.0}, wall_time=2e9)
    assert read_run(tmp_path).curves["train/loss"] == {0: 8.0}


def test_trainings_in_a_row_count_on_and_their_starts_are_known(tmp_path):
    write(tmp_path / "version_0", {9: 9.0, 19: 5.0}, wall_time=1e9)
    write(tmp_path / "version_1", {9: 4.0, 19: 3.5, 29: 3.4}, wall_time=2e9)
    # the second one was continued from a state
    write(tmp_path / "version_2", {19: 3.0, 29: 2.0}, wall_time=3e9)
    curves, starts = read_run(tmp_path, in_a_row=True)
    assert starts == [20]
    assert curves["train/loss"] == {9: 9.0, 19: 5.0, 29: 4.0, 39: 3.0, 49: 2.0}


def test_pictures_and_table(tmp_path, capsys):
    write(tmp_path / "logs" / "train_clip" / "version_0", {s: math.exp(-s / 20) for s in range(100)}, wall_time=1e9)
    plot(tmp_path / "logs", tmp_path / "images", table=tmp_path / "table.md")
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["training_clip.png"]
    assert "| clip | 99 | train/loss | 0.007083 |" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == final_values(
        {"train_clip": read_run(tmp_path / "logs/train_clip").curves}
    )


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match=r"holds no runs train_\* with TensorBoard events"):
        plot(tmp_path, tmp_path / "images")
    assert not (tmp_path / "images").exists()
