import random

import pytest
from quality_rows import ONE_RANK, SETTINGS, Conditions, Row, Setting, complete, read_rows, settings_of, write_rows

CONDITIONS = Conditions(25, 0, "float32")


def rows_of(settings, samples=8, conditions=CONDITIONS, model="tiny-sd"):
    """PSNR rises with warm-up and falls with stages; what a sample has in common hides it from unpaired means."""
    noise = random.Random(0)
    for setting in settings:
        for sample in range(samples):
            common = 30 * (sample % 4) + noise.gauss(0, 0.01)
            psnr_db = float("inf") if setting == ONE_RANK else common + setting.warm_up - 2 * setting.stages
            yield Row(model, conditions, setting, sample, psnr_db, common + setting.stages)


def test_settings_cover_what_is_asked_once():
    assert len(set(SETTINGS)) == len(SETTINGS) == 1 + 3 * 2 * 4 + 4
    assert Setting(2, 1, 2, 9) in SETTINGS


def test_rows_come_back(tmp_path):
    rows = list(rows_of(SETTINGS[:3]))
    write_rows(tmp_path / "samples_0of2.csv", rows[:10])
    write_rows(tmp_path / "samples_0of2.csv", rows[10:20], append=True)
    write_rows(tmp_path / "samples_1of2.csv", rows[20:], append=True)
    found = [row for part in read_rows(tmp_path, CONDITIONS) for row in part]
    assert [row[:4] for row in found] == [row[:4] for row in rows]
    assert [row.psnr_db for row in found] == pytest.approx([row.psnr_db for row in rows], abs=1e-4)


def test_what_was_cut_off_is_not_complete(tmp_path):
    path = tmp_path / "samples_0of1.csv"
    write_rows(path, rows_of(SETTINGS[:2]))
    path.write_text(path.read_text()[:-3])
    found = [row for part in read_rows(tmp_path) for row in part]
    assert len(found) == 15
    assert complete(found, 8) == {("tiny-sd", SETTINGS[0])}


def test_rows_of_other_conditions_are_refused(tmp_path):
    write_rows(tmp_path / "samples_0of1.csv", rows_of(SETTINGS[:1]))
    with pytest.raises(ValueError, match="made with 25 steps, seed 0, float32, not with 10 steps, seed 0, float32"):
        read_rows(tmp_path, Conditions(10, 0, "float32"))


class TestReport:
    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_from_shards_to_tables_and_a_plot(self, tmp_path):
        from quality_report import write_report

        for shard in range(2):
            settings = SETTINGS[shard::2]
            path = tmp_path / f"samples_{shard}of2.csv"
            write_rows(path, [*rows_of(settings), *rows_of(settings, model="tiny-svd")])
        text = write_report(tmp_path)
        assert text.count("PSNR rises with warm-up, by more than 2 paired standard errors: in 21 of 21") == 2
        assert text.count("PSNR falls with stages, by more than 2 paired standard errors: in 16 of 16") == 2
        assert "| cfg 2 x 2 stages | 4 |" in text
        assert (tmp_path / "quality.png").stat().st_size > 10_000
        assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + 2 * len(SETTINGS)
        assert len((tmp_path / "samples.csv").read_text().splitlines()) == 1 + 2 * 8 * len(SETTINGS)

    def test_what_does_not_hold_is_listed(self, tmp_path):
        from quality_report import compare, gather

        flat = [Setting(2, 1, 1, 1), Setting(2, 1, 1, 3)]
        rows = [row._replace(psnr_db=row.score) for row in rows_of(flat)]
        (comparison,) = compare(gather(rows)[0])
        assert not comparison.holds
        assert (comparison.better, comparison.worse) == (flat[1], flat[0])

    def test_one_setting_alone_can_be_reported(self, tmp_path):
        from quality_report import write_report

        write_rows(tmp_path / "samples_0of1.csv", rows_of([Setting(2, 1, 1, 3)]))
        text = write_report(tmp_path)
        assert "| layout | ranks | warm-up 3 |" in text
        assert "CLIP score" not in text

    def test_other_warm_ups_for_one_model(self, tmp_path):
        from quality_report import write_report

        write_rows(tmp_path / "samples_0of2.csv", rows_of(SETTINGS))
        write_rows(tmp_path / "samples_1of2.csv", rows_of(settings_of([13, 1]), model="tiny-svd"))
        pictures, videos = write_report(tmp_path).split("### tiny-svd")
        assert "| layout | ranks | warm-up 1 | warm-up 3 | warm-up 5 | warm-up 9 |" in pictures
        assert "| layout | ranks | warm-up 1 | warm-up 13 |" in videos
        assert "PSNR rises with warm-up, by more than 2 paired standard errors: in 7 of 7" in videos

    def test_no_rows(self, tmp_path):
        from quality_report import write_report

        with pytest.raises(ValueError, match="run `measure` into it first"):
            write_report(tmp_path)
