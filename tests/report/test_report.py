"""`report` on log folders as callbacks leave them: its figures are the runs' own, and its page needs nothing else."""

import csv
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from asyncdiff_pl.callbacks.sample_table import read_table, summarise
from asyncdiff_pl.cli.report import run_report
from asyncdiff_pl.report.embedded_pictures import SIDES, show_samples
from asyncdiff_pl.report.layout_labels import label_runs
from asyncdiff_pl.report.picture_measures import Tools
from asyncdiff_pl.report.plots import pareto_front
from asyncdiff_pl.report.report import report
from asyncdiff_pl.report.report_table import entries_of
from asyncdiff_pl.report.run_folders import groups_of, read_runs

IDS = ("1", "2", "3", "10")
SCORES = (20.0, 24.0, 21.0, 23.0)


def write_run(
    folder, seconds=8.0, score=0.0, change=0, steps=(4,), device="NVIDIA H200", frames=1, finished=True, **described
):
    """A log folder; `change` is added to the pictures of all samples but the first, `score` to all scores but its."""
    described = {"model": "tiny-sd", "weights": "pretrained", "device": device, "stages": "1", **described}
    folder.mkdir(parents=True)
    rows = []
    for n in steps:
        for place, (name, own) in enumerate(zip(IDS, SCORES, strict=True)):
            for frame in range(frames):
                pixels = np.random.default_rng(place + 10 * frame).integers(0, 200, (24, 32, 3), np.uint8)
                path = folder / "frames" / f"steps={n}" / (f"{name}/{frame:04}.png" if frames > 1 else f"{name}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels + np.uint8(change * (place > 0))).save(path)
            own_time = seconds + 0.1 * place
            times = {"seconds": f"{own_time}", "timed": str(place > 0), "step_latency_ms": f"{100 * own_time}"}
            scored = {"score": f"{own + score * (place > 0)}", "scorer": "CLIP score (x)"}
            rows.append({"steps": str(n), "id": name, **times, **scored})
    write(folder / ("samples.csv" if finished else "samples.part0.csv"), rows)
    (folder / "settings.json").write_text(json.dumps(described))
    kind = {
        "class_path": "asyncdiff_pl.strategies.AsyncDiffStrategy",
        "init_args": {"stages": int(described["stages"])},
    }
    config = {"trainer": {"devices": int(described["stages"]), "strategy": kind}, "data": {"init_args": {"x": [1, 2]}}}
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config))
    if finished:
        extra = {"peak_memory_gib": "3.25", "mib_per_step": "1.5"}
        write(folder / "results.csv", [{**row, **extra, **described} for row in summarise(rows).values()])
        curve = [{"steps": str(n), "step": str(k), "mean_ms": "5"} for n in steps for k in range(n)]
        write(folder / "latency.csv", curve)
    return folder


def write(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def table_of(folder):
    return {(row["layout"], row["steps"]): row for row in read_table(folder / "report.csv")}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "one", steps=(2, 4), frames=2),
        write_run(folder / "compiled", seconds=5.0, compile="blocks", change=1, frames=2),
        write_run(folder / "two", seconds=4.0, stages="2", change=10, score=-0.1, steps=(2, 4), frames=2),
        write_run(folder / "cfg", seconds=2.0, stages="2", cfg="2", change=20, score=-6.0, frames=2),
        write_run(folder / "cfg_warm", seconds=2.5, stages="2", cfg="2", warm_up="9", change=5, score=0.5, frames=2),
        write_run(folder / "stopped", seconds=1.0, stages="3", finished=False, frames=2),
    ]
    said = report([str(run) for run in runs], output=str(folder / "report"), samples=2)
    return folder, said, (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_figures_are_those_of_the_runs_tables(reported):
    folder, _, _ = reported
    table = table_of(folder / "report")
    assert len(table) == 8
    for row in table.values():
        results = {r["steps"]: r for r in read_table(folder / row["folder"].rpartition("/")[2] / "results.csv")}
        if row["state"] == "unfinished":
            assert results == {}
            continue
        own = results[row["steps"]]
        pairs = {
            **{"seconds": "avg_time", "step_latency_ms": "avg_step_latency_ms", "score": "avg_score"},
            **{name: name for name in ("peak_memory_gib", "mib_per_step", "samples", "device")},
        }
        assert {name: row[name] for name in pairs} == {name: own[column] for name, column in pairs.items()}
        # a standard error is that of the mean: from the deviation of the sample, while the tables have the population's
        count = int(own["timed_samples"])
        assert float(row["seconds_error"]) == pytest.approx(float(own["std_time"]) / (count - 1) ** 0.5, rel=1e-5)
        assert float(row["score_error"]) == pytest.approx(float(own["std_score"]) / 3**0.5, rel=1e-5)


def test_what_is_compared_is_compared_sample_by_sample_with_one_device(reported):
    table = table_of(reported[0] / "report")
    two = table["2 stages", "4"]
    assert float(two["speed_up"]) == pytest.approx(8.2 / 4.2, rel=1e-5)
    assert float(two["psnr_db"]) == pytest.approx(20 * np.log10(25.5), abs=1e-3)
    assert float(two["psnr_db_error"]) == pytest.approx(0, abs=1e-6)
    assert two["equal"] == "1"
    # of four differences one is 0 and three are -0.1
    assert float(two["score_difference"]) == pytest.approx(-0.075)
    assert float(two["score_difference_error"]) == pytest.approx(0.025)
    assert (table["one GPU", "4"]["psnr_db"], table["one GPU", "4"]["speed_up"]) == ("", "1")
    # there is no run of one device with as many steps to compare with, but of both step counts there is one for two
    assert table["2 stages", "2"]["psnr_db"]
    assert set(table) >= {("cfg 2 × 2 stages", "4"), ("cfg 2 × 2 stages, warm-up 9", "4")}


def test_one_sentence_for_each_number_of_gpus(reported):
    told = [line for line in reported[1].splitlines() if line.startswith("On ")]
    one, two, four = told
    assert one.startswith("On 1 GPU take one GPU, compiled blocks: with 4 steps 1.6× at +0.00 CLIP score (x), PSNR 48")
    assert two.startswith("On 2 GPUs take 2 stages: with 2 steps 2.0× at −0.0")
    assert "1.2× beside one GPU compiled" in two
    # the fastest loses five points; the stopped run on 3 counts for nothing
    assert four.startswith("On 4 GPUs take cfg 2 × 2 stages, warm-up 9: 3.0× at +0.3")


def test_the_page_holds_all_that_it_shows(reported):
    folder, _, page = reported
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="(data:[a-z/]*|[^"]*)', page)) == {
        "data:",
        "data:image/png",
        "data:image/webp",
    }
    assert len(page) < 20e6
    assert "4, unfinished" in page
    assert "--trainer.devices 2 --trainer.strategy.init_args.stages 2" in page
    plots = {path.stem for path in (folder / "report").glob("*.png")}
    assert plots == {"pareto_score", "pareto_psnr", "steps_score", "steps_seconds", "step_latency"}
    # two samples of six layouts at the larger step count
    assert page.count("data:image/webp") == 2 * 6


def test_pictures_shrink_and_then_become_fewer_until_they_fit(tmp_path):
    runs = read_runs(write_run(tmp_path / "one"))
    label_runs(runs)
    entries = entries_of(runs, Tools("cpu"))

    def size(limit):
        shown = show_samples(entries, 3, limit)
        return len(shown), sum(len(source) for sample in shown for _, source in sample.pictures)

    count, largest = size(10**7)
    assert count == 3
    count, smaller = size(largest - 1)
    assert (count, smaller < largest) == (3, True)
    count, fewest = size(smaller // len(SIDES))
    assert count < 3
    assert fewest <= smaller // len(SIDES)
    assert size(10) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"device": "cpu"}, "ran on a CPU"),
        ({"stages": "2"}, "no finished run of one GPU"),
        ({"weights": "random"}, "the weights are random"),
        ({"seconds": 9.0}, "On 2 GPUs nothing that was measured is faster than on one."),
        ({"simulate": "True"}, "nothing beside one GPU ran to its end"),
    ],
)
def test_no_more_is_recommended_than_was_measured(tmp_path, changes, expected):
    common = {name: value for name, value in changes.items() if name in ("device", "weights")}
    one = {} if "stages" not in changes else {"stages": "4"}
    runs = [write_run(tmp_path / "one", **one, **common)]
    runs.append(write_run(tmp_path / "two", **{"seconds": 5.0, "stages": "2", "change": 3, **changes}))
    said = report([str(tmp_path)], output=str(tmp_path / "report"), samples=0)
    assert expected in said
    assert ("On 2 GPUs take" in said) == ("weights" in changes)
    if "simulate" in changes:
        assert table_of(tmp_path / "report")["2 stages, simulated", "4"]["speed_up"] == ""


def test_runs_of_other_work_are_not_compared(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", stages="2", seed="7")]
    groups = groups_of([run for folder in folders for run in read_runs(folder)])
    assert [len(group) for group in groups] == [1, 1]


def test_the_front_is_what_nothing_beats_in_both():
    assert pareto_front([(2, 5), (1, 3), (3, 4), (2, 4), (4, 6)]) == [(1, 3), (2, 5), (4, 6)]


def test_the_command_prints_and_refuses(tmp_path, capsys):
    run = write_run(tmp_path / "one", frames=1)
    run_report([str(run), "--output", str(tmp_path / "out"), "--samples", "1"])
    assert capsys.readouterr().out.endswith(f"report: {tmp_path / 'out' / 'report.html'}\n")
    with pytest.raises(ValueError, match=r"There is no folder .*missing to report"):
        run_report([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"^report takes log folders: python -m asyncdiff_pl report RUN \[RUN ...\].$"):
        run_report([])
    with pytest.raises(ValueError, match=r"^samples is many; it must be int"):
        run_report([str(run), "--samples", "many"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no samples of a run"):
        run_report([str(tmp_path / "empty")])
