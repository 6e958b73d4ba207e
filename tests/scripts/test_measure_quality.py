"""What is measured in which order, and going on with it."""

import pytest
from measure_quality import measure, wanted
from quality_rows import ONE_RANK, SVD_WARM_UPS, WARM_UPS, Conditions, read_rows


def test_each_method_begins_with_one_rank_and_has_its_own_settings():
    found = {method: wanted(method, WARM_UPS, [3]) for method in ("patches", "steps", "stages")}
    assert all(settings[0] == ONE_RANK for settings in found.values())
    every = [setting for settings in found.values() for setting in settings[1:]]
    assert len(set(every)) == len(every) == 2 * 11 + 4 * 4 + 7 * 4
    # patches are measured with a warm-up that the others have too, on both models
    assert {setting.warm_up for setting in found["patches"]} <= {0, *WARM_UPS} & {0, *SVD_WARM_UPS}


def test_a_shard_runs_its_settings_and_goes_on(tmp_path, capsys):
    settings = {"svd": None, "methods": ["steps"], "warm_ups": [1], "samples": 1, "steps": 3, "device": "cpu"}
    measure(tmp_path, "1/3", **settings)
    path = tmp_path / "samples_1of3.csv"
    before = path.read_text()
    two, halves = (row for part in read_rows(tmp_path, Conditions(3, 0, "float32")) for row in part)
    assert [(row.setting.at_once, row.setting.cfg) for row in (two, halves)] == [(2, 1), (2, 2)]
    # of three steps one is foreseen; a split of the guidance batch changes nothing
    assert 20 < two.psnr_db < 100
    assert abs(halves.psnr_db - two.psnr_db) < 0.1
    path.write_text("\n".join(before.splitlines()[:-1]) + "\n")
    capsys.readouterr()
    measure(tmp_path, "1/3", **settings)
    assert path.read_text() == before
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-sd")]
    assert [line.split(":")[0] for line in told] == ["tiny-sd, cfg 2 x 2 steps, warm-up 1"]


def test_only_takes_settings_by_their_names(tmp_path):
    with pytest.raises(ValueError, match="only names 2 stage, warm-up 3, which is not measured"):
        measure(tmp_path, only=["one rank", "2 stage, warm-up 3"], device="cpu")
