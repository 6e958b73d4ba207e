"""What a run saves as its settings starts a new run like it, wherever it came from itself."""

import shutil

import pytest
import yaml

ONE_RANK = ("--trainer.devices", "1", "--trainer.strategy.stages", "1", "--clip_score.model", "null")
SHORT = (*ONE_RANK, "--data.max_images", "2", "--model.num_inference_steps", "1")


@pytest.fixture(scope="module")
def made(apart, tmp_path_factory):
    """A run that is over."""
    with apart(tmp_path_factory.mktemp("made")) as elsewhere:
        elsewhere.here(*SHORT)
    return elsewhere.log()


@pytest.fixture
def done(command, made):
    """Its log folder, in the command's own."""
    shutil.copytree(made.path, command.log().path)
    return command.log()


def test_a_saved_config_starts_a_new_run(command, done):
    command.here(*SHORT, config=done.path / "config.yaml")
    assert command.log(version=1).samples() == done.samples()


def test_a_saved_config_needs_nothing_else(command, made, done, monkeypatch):
    monkeypatch.setattr(command, "arguments", lambda *more: [*more])
    command.here("predict", "--config", str(made.path / "config.yaml"))
    assert type(made)(made.path.with_name("version_1")).samples() == done.samples()


def test_a_resumed_run_saves_what_starts_a_new_one(command, done):
    command.here(*SHORT, "--resume", str(done.path), "--data.max_images", "3")
    assert [row["id"] for row in done.samples()] == ["1", "2", "3"]
    saved = yaml.safe_load((done.path / "config.yaml").read_text())
    assert saved["data"]["init_args"]["max_images"] == 3
    assert saved["resume"] is None
    command.here("--data.max_images", "3", *ONE_RANK, config=done.path / "config.yaml")
    # not in the folder that was resumed
    assert len(command.log(version=1).samples()) == 3


def test_resume_with_other_settings_is_refused(command, done):
    with pytest.raises(ValueError, match=r"version_0 has seed 0 but this one has 5: give the same"):
        command.here(*SHORT, "--resume", str(done.path), "--model.seed", "5")
    assert len(done.samples()) == 2


def test_resume_of_a_finished_run_does_nothing_more(command, done, capsys):
    before = (done.path / "samples.csv").read_text()
    command.here(*SHORT, "--resume", str(done.path))
    assert (done.path / "samples.csv").read_text() == before
    assert "2 samples are done" in capsys.readouterr().out
