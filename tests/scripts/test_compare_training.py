import csv

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from compare_training import measure, throughput
from torch import nn
from training_report import COLUMNS, against, read_rows, read_verdict, report
from training_runs import METHODS, build_method
from training_verdict import verdict

from asyncdiff_pl.training.loss_weights import MinSNRWeight
from asyncdiff_pl.training.timesteps import AdaptiveTimesteps, SpeeD


class Colours(nn.Module):
    """The mean of each colour."""

    def forward(self, pictures):
        return pictures.double().mean((2, 3)) / 255


def test_runs_are_measured_at_their_marks_and_not_made_again(tmp_path, capsys, monkeypatch):
    data = tmp_path / "train.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8))
    settings = {
        "methods": ["uniform", "beta-policy:every=1,grid=4"],
        "seeds": [3],
        "minutes": [0.001, 0.002],
        "batch_size": 2,
        "free_steps": 1,
        "pictures": 6,
        "sample_batch": 4,
        "sample_steps": 2,
        "features": f"{__name__}.Colours",
        "compile": False,
        "tiny": True,
    }
    output = tmp_path / "output"
    measure(output, data, gpus="1/2", keep=True, **settings)
    (first, second) = rows = read_rows(output)
    assert [row["method"] for row in rows] == ["beta-policy:every=1,grid=4"] * 2
    assert [float(row["minutes"]) for row in rows] == [0.001, 0.002]
    assert 0.06 <= float(first["seconds"]) <= float(second["seconds"]) - 0.03
    assert int(second["images"]) == 2 * int(second["steps"]) > int(first["images"])
    assert float(first["distance"]) > 0
    assert (output / "networks" / "beta-policy-every=1,grid=4-3" / "model_index.json").exists()
    measure(output, data, gpus="1/2", **settings)
    assert read_rows(output) == rows
    measure(output, data, runs=1, keep=True, **settings)
    table = (output / "table.md").read_text()
    assert table.splitlines()[0].startswith(f"frechet_distance ({__name__}.Colours), 6 pictures")
    assert "| uniform | 1 |" in table
    assert table.count(f"{float(second['distance']):.2f}") >= 3
    assert capsys.readouterr().out.endswith(table)
    assert (output / "distance.png").stat().st_size > 5000

    sampling = {"pictures": 5, "sample_batch": 3, "sample_steps": 3, "features": f"{__name__}.Colours"}
    verdict(output, data, compile=False, **sampling)
    found = read_verdict(output)
    assert [(row["method"], row["seed"]) for row in found] == [("uniform", "3"), ("beta-policy:every=1,grid=4", "3")]
    assert (
        f"5 pictures of ancestral sampling in 3 steps (fixed_small), after {rows[1]['minutes']} min"
        in capsys.readouterr().out
    )
    verdict(output, data, compile=False, **sampling)
    assert read_verdict(output) == found
    with pytest.raises(ValueError, match="keeps no network of p2; run `measure` with `--keep true` in it first"):
        verdict(output, data, methods=["p2"], **sampling)


def test_throughput_is_that_of_steps_after_the_first(tmp_path, capsys):
    data = tmp_path / "train.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8))
    settings = {"batch_sizes": [1, 2], "steps": 2, "free_steps": 1, "compile": False, "tiny": True}
    throughput(tmp_path, data, methods=["adaptive:follow=0"], **settings)
    with (tmp_path / "throughput.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        ("adaptive:follow=0", "1"),
        ("adaptive:follow=0", "2"),
    ]
    for row in rows:
        images = int(row["batch_size"]) * 2
        assert float(row["images_per_second"]) == pytest.approx(images / float(row["seconds"]), rel=0.02, abs=1)


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for method, seed, minutes, distance, *began in rows:
            row = (method, seed, minutes, 60 * minutes, 100, 12800, distance, 5000, "frechet_distance (x)")
            row += (*began, 1)[:1]
            writer.writerow(dict(zip(COLUMNS, row, strict=True)))


def test_the_table_has_means_and_spreads_of_all_processes_rows(tmp_path):
    write(tmp_path / "runs-0.csv", [("uniform", 0, 1.0, 90.0), ("uniform", 0, 2.0, 50.0), ("p2", 1, 2.0, 41.0)])
    # of a run that was stopped, and began anew in another process, nothing counts
    write(tmp_path / "runs-1.csv", [("uniform", 1, 2.0, 60.0), ("p2", 0, 2.0, 45.0, 9), ("p2", 2, 1.0, 70.0, 9)])
    write(tmp_path / "runs-2.csv", [("p2", 0, 1.0, 99.0, 5), ("p2", 0, 2.0, 99.0, 5)])
    report(tmp_path)
    rows = (tmp_path / "table.md").read_text().splitlines()[4:]
    assert rows == [
        "| p2 | 2 | 142 | 70.00 | 43.00 (41.00 to 45.00) | each seed better |",
        "| uniform | 2 | 142 | 90.00 | 55.00 (50.00 to 60.00) |  |",
    ]


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        ({"0": 1.0, "1": 2.0}, {"0": 2.1, "1": 3.0}, "each seed better"),
        ({"0": 1.0, "1": 2.5}, {"0": 2.1, "1": 3.0}, "mixed"),
        ({"0": 5.0, "1": 4.0}, {"0": 2.1, "1": 3.0}, "each seed worse"),
        ({"0": 1.0}, {"0": 2.1, "1": 3.0}, ""),
        ({"0": 5.0}, {}, ""),
    ],
)
def test_a_win_needs_each_seed(own, other, verdict):
    assert against(own, other) == verdict


def test_methods_and_their_settings():
    found = build_method("adaptive-min-snr:follow=0,even_share=0.5")
    assert isinstance(found["timesteps"], AdaptiveTimesteps)
    assert (found["timesteps"].follow, found["timesteps"].even_share) == (0, 0.5)
    assert isinstance(found["weight"], MinSNRWeight)
    assert isinstance(build_method("speed-sampler")["timesteps"], SpeeD)
    assert not build_method("speed-sampler")["timesteps"].weigh
    assert all(build_method(name) for name in METHODS)
    with pytest.raises(ValueError, match="There is no method best; give some of uniform, min-snr"):
        build_method("best")
