import math
import random
import re

import pytest
from quality_rows import (
    COLUMNS,
    ONE_RANK,
    SETTINGS,
    STEP_LAYOUTS,
    Conditions,
    Row,
    Setting,
    complete,
    patch_settings,
    read_rows,
    settings_of,
    write_rows,
)

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.patches.settings import MODES, PatchSettings

CONDITIONS = Conditions(25, 0, "float32")


def rows_of(settings, samples=8, conditions=CONDITIONS, model="tiny-sd"):
    """PSNR rises with warm-up and falls with stages, and less with steps: what a sample has in common hides it."""
    noise = random.Random(0)
    for setting in settings:
        for sample in range(samples):
            common = 30 * (sample % 4) + noise.gauss(0, 0.01)
            age = 2 * setting.stages if setting.stages > 1 else setting.at_once
            psnr_db = float("inf") if setting == ONE_RANK else common + setting.warm_up - age
            yield Row(model, conditions, setting, sample, psnr_db, common + setting.stages)


def patch_rows(settings, samples=8):
    """PSNR rises with what a mode sees of other patches, with the portion and with warm-up."""
    worth = {"naive": 0, "no_sync": 1, "separate_gn": 2, "corrected_async_gn": 10, "stale_gn": 10, "sync_gn": 11}
    noise = random.Random(0)
    for setting in settings:
        for sample in range(samples):
            common = 30 * (sample % 4) + noise.gauss(0, 0.01)
            own = worth.get(setting.mode, 20) + setting.portion + setting.warm_up / 10 - setting.patches / 100
            yield Row("tiny-sd", CONDITIONS, setting, sample, common + own, common)


def test_patches_are_measured_in_every_mode_and_portion_once():
    settings = patch_settings([4], [2])
    assert len(set(settings)) == len(settings) == 7 + 4
    assert {setting.mode for setting in settings} == set(MODES)
    assert sorted(s.portion for s in settings if s.mode == "corrected_async_gn") == [0, 0.1, 0.3, 0.5, 1]
    # what has no warm-up is measured once
    assert len(patch_settings([1, 4], [2, 4])) == 2 * (2 + 2 * 9)
    assert not set(patch_settings()) & set(SETTINGS)


@pytest.mark.parametrize("setting", patch_settings(), ids=str)
def test_every_setting_of_patches_can_be_run(setting):
    layout = Layout(patches=setting.patches)
    PatchSettings(layout, setting.mode, max(1, setting.warm_up), setting.portion)
    assert setting.ranks == layout.pipeline_ranks


def test_rows_from_before_there_were_patches_are_read(tmp_path):
    rows = list(rows_of(SETTINGS[:3]))
    write_rows(tmp_path / "samples_0of2.csv", rows)
    added = [COLUMNS.index(name) for name in ("patches", "mode", "portion", "at_once")]
    table = [line.split(",") for line in (tmp_path / "samples_0of2.csv").read_text().splitlines()]
    old = [",".join(cell for at, cell in enumerate(line) if at not in added) for line in table]
    (tmp_path / "samples_0of2.csv").write_text("\n".join(old) + "\n")
    new = list(patch_rows(patch_settings([4], [2])))
    write_rows(tmp_path / "samples_1of2.csv", new)
    before, after = read_rows(tmp_path, CONDITIONS)
    assert [row[:4] for row in before] == [row[:4] for row in rows]
    assert [row[:4] for row in after] == [row[:4] for row in new]


def test_settings_cover_what_is_asked_once():
    assert len(set(SETTINGS)) == len(SETTINGS) == 1 + 3 * 2 * 4 + 4
    assert Setting(2, 1, 2, 9) in SETTINGS


def test_steps_at_a_time_are_measured_on_the_ranks_of_stages():
    settings = settings_of([3], STEP_LAYOUTS)[1:]
    assert [(setting.at_once, setting.cfg, setting.ranks) for setting in settings] == [
        (2, 1, 2),
        (3, 1, 3),
        (4, 1, 4),
        (2, 2, 4),
    ]
    assert [str(setting) for setting in settings[::3]] == ["2 steps, warm-up 3", "cfg 2 x 2 steps, warm-up 3"]
    assert not set(settings) & set(SETTINGS)


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
        assert not (tmp_path / "quality_ranks.png").exists()
        assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + 2 * len(SETTINGS)
        assert len((tmp_path / "samples.csv").read_text().splitlines()) == 1 + 2 * 8 * len(SETTINGS)

    def test_patches_have_tables_and_an_order_of_their_own(self, tmp_path):
        from quality_report import write_report

        one = [Row("tiny-sd", CONDITIONS, ONE_RANK, sample, float("inf"), 0.0) for sample in range(8)]
        write_rows(tmp_path / "samples_0of1.csv", [*one, *patch_rows(patch_settings([1, 4]))])
        text = write_report(tmp_path)
        assert "| mode | 2 patches, warm-up 1 | 2 patches, warm-up 4 | 4 patches, warm-up 1 | 4 patches, " in text
        assert [line.split("|")[1].strip() for line in text.split("\n\n")[2].splitlines()[2:]] == [
            *(
                "`full_sync`",
                "`corrected_async_gn`",
                *(f"`corrected_async_gn`, portion {p}" for p in (0.5, 0.3, 0.1, 0)),
            ),
            *("`stale_gn`", "`sync_gn`", "`separate_gn`", "`no_sync`", "`naive`"),
        ]
        outcomes = re.findall(r"^- PSNR (rises .*), by more than 2 .*: in (\d+) of (\d+) comp", text, re.MULTILINE)
        assert [(int(holding), int(number)) for _, holding, number in outcomes] == [
            (28, 28),
            (8, 8),
            (16, 16),
            (18, 18),
        ]
        assert "warm-up 0" not in text
        assert not (tmp_path / "quality.png").exists()

    def test_stages_and_patches_of_one_model(self, tmp_path):
        from quality_report import write_report

        write_rows(tmp_path / "samples_0of1.csv", [*rows_of(SETTINGS), *patch_rows(patch_settings([4]))])
        text = write_report(tmp_path)
        assert "PSNR rises with warm-up, by more than 2 paired standard errors: in 21 of 21" in text
        assert "PSNR rises with the portion, by more than 2 paired standard errors: in 8 of 8" in text
        assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + len(SETTINGS) + 22

    def test_ways_stand_side_by_side_on_as_many_gpus(self, tmp_path):
        from quality_report import write_report

        steps = settings_of([1, 3, 5, 9], STEP_LAYOUTS)[1:]
        rows = [*rows_of([*SETTINGS, *steps]), *patch_rows(patch_settings([3]))]
        write_rows(tmp_path / "samples_0of1.csv", rows)
        text = write_report(tmp_path)
        tables = text[text.index("on the same number of GPUs") :].split("\n\n")[1:4:2]
        layouts = [[line.split(" | ")[:2] for line in table.splitlines()[2:]] for table in tables]
        assert layouts[0] == layouts[1]
        assert [f"{ranks} {name}" for ranks, name in layouts[0]] == [
            *("| 2 2 stages", "| 2 2 steps", "| 2 2 patches, full_sync", "| 2 2 patches, corrected_async_gn"),
            *("| 4 4 stages", "| 4 cfg 2 x 2 stages", "| 4 4 steps", "| 4 cfg 2 x 2 steps"),
            *("| 4 4 patches, full_sync", "| 4 4 patches, corrected_async_gn"),
        ]
        full_sync, asynchronous = (tables[0].splitlines()[2 + at].split(" | ")[2:] for at in (2, 3))
        assert len({cell.removesuffix(" |") for cell in full_sync}) == 1
        assert [bool(cell.strip(" |")) for cell in asynchronous] == [False, True, False, False]
        assert "PSNR of steps at a time is above that of stages on as many ranks, with equal warm-up, " in text
        for name, number in (("warm-up", 33), ("stages", 16), ("steps at a time", 8)):
            assert re.search(f"PSNR (rises|falls) with {name}, .*: in {number} of {number} comparisons", text)
        assert re.search("is above that of stages on .*: in 16 of 16 comparisons", text)
        assert re.search("is above that of 4 stages or steps, .*: in 8 of 8 comparisons", text)
        assert "cfg 2 x 2 steps against 2 steps: PSNR differs by at most 0." in text
        assert (tmp_path / "quality_ranks.png").stat().st_size > 10_000

    def test_a_mode_that_is_no_better_is_listed(self, tmp_path):
        from quality_figures import gather
        from quality_patches import compare_patches

        rows = [row._replace(psnr_db=row.score) for row in patch_rows(patch_settings([4], [2]))]
        comparisons = compare_patches(gather(rows)[0])
        assert len(comparisons) == 7 + 2 + 4
        assert not any(comparison.holds for comparison in comparisons)
        exact = [row._replace(psnr_db=math.inf) if row.setting.mode == "full_sync" else row for row in rows]
        held = [comparison for comparison in compare_patches(gather(exact)[0]) if comparison.holds]
        assert {comparison.better.mode for comparison in held} == {"full_sync"}
        assert len(held) == 3

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
