"""`sweep`: a grid as cells, and how they run, fail, stop and go on; cells here leave a log folder without a run."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from asyncdiff_pl.cli import sweep as command
from asyncdiff_pl.cli.overview import CONFIGS, overview, packaged_configs, packaged_sweeps, with_named_configs
from asyncdiff_pl.report import sweep as sweep_module
from asyncdiff_pl.report.grid import STAGES, read_sweep
from asyncdiff_pl.report.run_folders import CELLS, expand

SAMPLES = "steps,id,score,seconds,timed,step_latency_ms,scorer\n2,1,20,1.5,True,700,CLIP\n2,2,22,2.5,True,900,CLIP\n"
RESULTS = "steps,samples,avg_score,avg_time,stages,device\n2,2,21,2,{stages},cpu\n"


@pytest.fixture
def config(tmp_path):
    content = {
        "config": "demo_image",
        "settings": {"data": {"init_args": {"max_prompts": 2}}},
        "steps": [2, 3],
        "strategies": [
            {"class_path": STAGES, "init_args": {"stages": 2}, "grid": {"warm_up": [1, 2], "cfg": [1, 2]}},
            {"class_path": "asyncdiff_pl.strategies.PatchStrategy", "name": "patches"},
        ],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Cells:
    """Starts cells: each leaves a log folder, or ends as it is told to."""

    def __init__(self, ends):
        self.ends = ends
        self.started = []
        self.terminated = 0

    def __call__(self, arguments, log):
        assert arguments[:2] == ["predict", "--config"]
        self.config = yaml.safe_load(Path(arguments[2]).read_bytes())
        self.folder = log.with_suffix("")
        self.started.append((log.stem, *arguments[3:]))
        self.end = self.ends.get(log.stem, 0)
        log.write_text("asyncdiff_pl: error: rank 0 has no memory.\nand more\n" if self.end == 2 else "fine\n")
        return self

    def wait(self, timeout=None):
        if self.end is KeyboardInterrupt and timeout is None:
            raise KeyboardInterrupt
        if self.end == 0:
            self.folder.mkdir(exist_ok=True)
            stages = self.config["trainer"]["strategy"]["init_args"].get("stages", 1)
            (self.folder / "samples.csv").write_text(SAMPLES)
            (self.folder / "results.csv").write_text(RESULTS.format(stages=stages))
        return self.end

    def terminate(self):
        self.terminated += 1


def test_a_grid_has_one_device_first_and_the_devices_of_each_layout(config, tmp_path):
    sweep = read_sweep(str(config), str(tmp_path / "out"))
    names = [cell.name for cell in sweep.cells]
    layouts = ["one", *(f"stages2_warm_up{w}_cfg{c}" for w in (1, 2) for c in (1, 2)), "patches"]
    assert names == [f"{name}_{n}steps" for n in (2, 3) for name in layouts]
    assert [cell.devices for cell in sweep.cells[:6]] == [1, 2, 4, 2, 4, 2]
    cell = sweep.cells[-2]
    assert cell.config["model"]["init_args"] | {"num_inference_steps": 3} == cell.config["model"]["init_args"]
    assert cell.config["data"]["init_args"] == {"path": "demo", "max_prompts": 2}
    assert cell.config["trainer"]["strategy"]["init_args"] == {"stages": 2, "warm_up": 2, "cfg": 2}
    # its log folder is known before it runs: the same command goes on there
    place = cell.config["trainer"]["logger"]["init_args"]
    assert (place["save_dir"], place["name"], place["version"]) == (str(tmp_path), "out", cell.name)


@pytest.mark.parametrize("name", packaged_sweeps())
def test_packaged_sweeps_are_right(name):
    sweep = read_sweep(str(CONFIGS / f"{name}.yaml"))
    names = {cell.name.rpartition("_")[0] for cell in sweep.cells}
    on_gpus = name != "sweep_demo"
    assert ({"one", "one_compiled"} <= names) == on_gpus
    assert max(cell.devices for cell in sweep.cells) == (4 if on_gpus else 2)
    for cell in sweep.cells:
        module, _, kind = cell.config["trainer"]["strategy"]["class_path"].rpartition(".")
        # a strategy refuses settings that do not go together
        getattr(importlib.import_module(module), kind)(**cell.config["trainer"]["strategy"]["init_args"])


def test_sweeps_have_a_place_of_their_own_among_the_configs():
    assert "sweep_demo" in packaged_sweeps()
    assert not set(packaged_sweeps()) & set(packaged_configs())
    assert "  sweep_demo " in overview()
    with pytest.raises(ValueError, match="sweep_demo is a config of `sweep`"):
        with_named_configs(["predict", "--config", "sweep_demo"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 4}, "give a list of step counts"),
        ({"grids": []}, "has grids; a sweep has config"),
        ({"strategies": [{"class_path": STAGES, "grid": {"stages": 2}}]}, "grid.stages of a sweep is 2; give a list"),
        ({"strategies": [{"class_path": "Missing"}]}, "There is no strategy Missing"),
        ({"strategies": [{"class_path": STAGES, "name": "one"}]}, "are called one_2steps"),
        ({"config": "nothing"}, "There is no config nothing"),
    ],
)
def test_a_wrong_sweep_ends_in_one_sentence(config, changes, sentence):
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=sentence):
        read_sweep(str(config))


def test_a_sweep_is_stopped_goes_on_and_tells_of_what_failed(config, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    arguments = ["--config", str(config), "--folder", str(folder), "--data.height", "64"]
    stopped, failing = "stages2_warm_up1_cfg2_2steps", "stages2_warm_up1_cfg1_2steps"
    cells = Cells({stopped: KeyboardInterrupt, failing: 2})
    monkeypatch.setattr(sweep_module, "start_predict", cells)
    with pytest.raises(KeyboardInterrupt):
        command.run_sweep(arguments)
    said = capsys.readouterr().out
    assert cells.terminated == 1
    assert cells.started[0] == ("one_2steps", "--data.height", "64")
    assert "[1/12] one_2steps: finished in 0 s, 2 s a sample, score 21" in said
    assert f"[2/12] {failing}: failed, rank 0 has no memory. (all that it said: " in said
    assert f"Go on with: python -m asyncdiff_pl sweep {' '.join(arguments)}" in said
    # what is there can be reported
    assert [path.name for path in expand([str(folder)])] == ["one_2steps"]

    cells = Cells({failing: 2})
    monkeypatch.setattr(sweep_module, "start_predict", cells)
    with pytest.raises(SystemExit) as end:
        command.run_sweep(arguments)
    assert end.value.code == 1
    assert [name for name, *_ in cells.started][:2] == [failing, stopped]
    assert len(cells.started) == 11
    said = capsys.readouterr().out
    assert "[1/12] one_2steps: finished before" in said
    assert f"{failing}: failed: rank 0 has no memory." in said
    assert (folder / "report" / "report.html").exists()
    states = [line.split(",")[3] for line in (folder / CELLS).read_text().splitlines()[1:]]
    assert states == ["finished", "failed", *["finished"] * 10]

    # other settings: nothing that is there counts as finished
    cells = Cells({})
    monkeypatch.setattr(sweep_module, "start_predict", cells)
    command.run_sweep([*arguments[:-1], "128"])
    assert len(cells.started) == 12


def test_two_sweeps_do_not_write_in_one_folder(config, tmp_path):
    sweep = read_sweep(str(config), str(tmp_path / "out"))

    def start(arguments, log):
        with pytest.raises(ValueError, match="Another sweep is running in"):
            sweep_module.run_cells(sweep, start=start)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_module.run_cells(sweep, start=start)


def test_a_cell_is_a_process_that_ends_when_it_is_asked_to(tmp_path, monkeypatch):
    """The one process: what the command does there is not run, but what starts it and what it says are."""
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    process = sweep_module.start_predict(["predict", "--config", "x.yaml"], tmp_path / "log")
    assert process.wait(10) == 0
    assert (tmp_path / "log").read_text() == "-m asyncdiff_pl predict --config x.yaml\n"
