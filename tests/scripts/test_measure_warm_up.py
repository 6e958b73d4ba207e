import csv

import measure_warm_up
import pytest
from measure_warm_up import COLUMNS, ONE_RANK, Row, Setting, complete, merge, read_rows, write_rows

COUNT, DRIFT, REFRESH = Setting(2, "count", 3), Setting(2, "drift", 0.1), Setting(4, "count", 3, 10)


def rows_of(setting, exact, psnr_db, score):
    return [Row(25, 0, setting, sample, n, psnr_db + sample, 70 + sample + score) for sample, n in enumerate(exact)]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "samples_0of1.csv"
    write_rows(path, rows_of(COUNT, [3, 3], 28, -1))
    write_rows(path, rows_of(DRIFT, [4, 9], 31, 0), append=True)
    assert complete(read_rows(path), 2) == {COUNT, DRIFT}
    path.write_text(path.read_text()[:-3])
    assert complete(read_rows(path), 2) == {COUNT}
    assert read_rows(path)[:2] == rows_of(COUNT, [3, 3], 28, -1)


def test_the_report_puts_shards_together(tmp_path, capsys):
    first = [*rows_of(ONE_RANK, [25, 25], float("inf"), 0), *rows_of(DRIFT, [4, 9], 31, 1)]
    write_rows(tmp_path / "samples_0of2.csv", first)
    # each shard measures one rank anew; a setting that is not yet whole is left out
    second = [*first[:2], *rows_of(COUNT, [3, 3], 28, -2), *rows_of(REFRESH, [5], 25, 0)]
    write_rows(tmp_path / "samples_1of2.csv", second)
    merge(tmp_path)
    text = capsys.readouterr().out
    assert "| 2 | `warm_up 3` | 3 | 1.79 | 28.50 ± 0.50 | -2.00 ± 0.00 |" in text
    assert "| 2 | `until_drift 0.1` | 6.5 (4 to 9) | 1.59 | 31.50 ± 0.50 | +1.00 ± 0.00 |" in text
    assert "refresh_every" not in text
    assert (tmp_path / "warm_up.md").read_text() in text
    assert len(read_rows(tmp_path / "samples.csv")) == 7
    with (tmp_path / "summary.csv").open() as file:
        assert [row["form"] for row in csv.DictReader(file)] == ["count", "drift"]
    assert (tmp_path / "warm_up.png").stat().st_size > 10_000


def test_a_folder_without_rows(tmp_path):
    with pytest.raises(ValueError, match="holds no samples_"):
        merge(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rules_are_measured_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_warm_up, "STAGES", (2,))
    monkeypatch.setattr(measure_warm_up, "FORMS", (("count", 2, 0), ("count", 1, 2), ("noise", 0.9, 0)))
    settings = {"samples": 2, "steps": 5, "device": "cpu"}
    measure_warm_up.measure(tmp_path, **settings)
    rows = read_rows(tmp_path / "samples_0of1.csv")
    assert [(row.setting.stages, row.exact_steps) for row in rows[:6:2]] == [(1, 5), (2, 2), (2, 3)]
    assert all(row.psnr_db == float("inf") for row in rows[:2])
    assert all(row.psnr_db < 60 for row in rows[2:])
    assert len(rows) == 8
    capsys.readouterr()
    measure_warm_up.measure(tmp_path, **settings)
    assert capsys.readouterr().out == ""
    assert read_rows(tmp_path / "samples_0of1.csv") == rows
    assert (tmp_path / "samples_0of1.csv").read_text().startswith(",".join(COLUMNS))
