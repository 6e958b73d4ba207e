"""What is measured of solving a sample's steps together, and what is told of it."""

import pytest
from measure_parallel_in_time import measure, merge
from parallel_in_time_rows import (
    PLAIN,
    VARIATIONS,
    Job,
    Row,
    Setting,
    complete,
    gather,
    jobs_of,
    read_rows,
    tables,
    write_rows,
)

from asyncdiff_pl.parallel import TimeParallel

MODELS = ("tiny-sd", "tiny-dit")


def rows_of(jobs, samples=3):
    """Order N with memory takes few iterations, a loose tolerance fewer, and is further away."""
    for job in jobs:
        setting = job.setting
        rounds = job.steps // (2 if setting.order == 1 else 8 if setting.memory > 1 else 4)
        if setting.tolerance == 1e-3:
            rounds += 4
        for sample in range(samples):
            near = {1e-1: 20.0, 3e-2: 25.0, 1e-2: 40.0, 1e-3: 60.0}[setting.tolerance]
            yield Row(job, 0, sample, rounds + sample, rounds * job.steps // 2, 0, near + sample)


def test_the_grid_holds_what_is_asked_once():
    jobs = jobs_of(MODELS)
    assert len(set(jobs)) == len(jobs) == 2 * 2 * (3 * 3 * 3 + 3 + len(VARIATIONS))
    for job in jobs:
        setting = job.setting
        own = {"order": setting.order, "memory": setting.memory, "safeguard": setting.safeguard}
        TimeParallel(
            method=setting.method,
            tolerance=setting.tolerance,
            window=setting.window,
            **({} if setting.method == "picard" else own),
        )
    assert PLAIN in {job.setting for job in jobs}
    assert all(variation.variation or variation.memory > 3 or variation.tolerance == 3e-2 for variation in VARIATIONS)


def test_rows_come_back_and_what_was_cut_off_is_not_complete(tmp_path):
    rows = list(rows_of(jobs_of(MODELS)))
    path = tmp_path / "samples_0of1.csv"
    write_rows(path, rows[:30])
    write_rows(path, rows[30:], append=True)
    assert read_rows(tmp_path) == rows
    assert complete(rows, 3, seed=0) == set(jobs_of(MODELS))
    assert complete(rows, 4, seed=0) == complete(rows, 3, seed=1) == set()
    path.write_text(path.read_text()[:-3])
    assert read_rows(tmp_path) == rows[:-1]
    assert complete(read_rows(tmp_path), 3, seed=0) == set(jobs_of(MODELS)[:-1])


def test_tables_tell_whether_a_quarter_of_the_steps_suffices():
    lines = tables(gather(rows_of(jobs_of(["tiny-dit"], [100]))))
    assert "| order N, memory 2 | 13.0 (14), 600, 21.0 | 13.0 (14), 600, 41.0 | 17.0 (18), 800, 61.0 |" in lines
    assert sum(line.startswith("| order ") for line in lines) == 9 + 1 + len(VARIATIONS)
    (told,) = (line for line in lines if "Fewest iterations with 30 dB" in line)
    # 12 iterations of memory 2 and 3, and the first step
    assert "memory 2, tolerance 0.01: 13.0 (most 14), 41.0 dB (least 40.0)" in told
    assert "with the first step 15 rounds, at most a quarter of 100 steps" in told
    slow = [Job("tiny-dit", 100, Setting("triangular_anderson", 1, 1, 1e-2))]
    assert "53 rounds, more than a quarter of 100 steps" in "\n".join(tables(gather(rows_of(slow))))
    far = [Job("tiny-dit", 100, Setting("picard", None, 2, 1e-1))]
    assert "- No setting comes to 30 dB." in tables(gather(rows_of(far)))


def test_a_report_has_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "samples_0of2.csv", rows_of(jobs_of(MODELS)[::2]))
    write_rows(tmp_path / "samples_1of2.csv", rows_of(jobs_of(MODELS)[1::2]))
    merge(tmp_path)
    assert capsys.readouterr().out.count("### tiny-") == 4
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 1 + 3 * len(jobs_of(MODELS))


def test_pictures_are_solved_once(tmp_path):
    settings = {"models": ["tiny-dit"], "steps": [3], "samples": 1, "device": "cpu"}
    measure(tmp_path, **settings, only="memory 2, tolerance 0.001, guidance 1")
    measure(tmp_path, **settings, only="ParaDiGMS, tolerance 0.001")
    path = tmp_path / "samples_0of1.csv"
    before = path.read_text()
    anderson, picard = read_rows(tmp_path)
    assert (anderson.job.setting.guidance, picard.job.setting.method) == (1.0, "picard")
    # two states beside the exact first step; nearly all digits are those of one step after the other
    assert 1 <= anderson.iterations <= 2
    assert anderson.denoiser_calls in (3, 4)
    assert min(anderson.psnr_db, picard.psnr_db) > 60
    measure(tmp_path, **settings, only="memory 2, tolerance 0.001, guidance 1")
    assert path.read_text() == before
