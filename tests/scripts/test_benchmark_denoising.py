import threading
import time

import pytest
import torch
from denoising_jobs import PLAIN, Job, parse, plan, short_run, sized
from denoising_models import FULL, TINY, Denoising
from denoising_ranks import Clock
from denoising_report import COLUMNS, Table, compare_layouts, line, newest, plot, read_rows
from denoising_times import Marks, Run, figures, figures_of_rounds, relative_deviation
from script_ranks import run_on_two

from asyncdiff_pl.parallel import Layout, parallelize
from asyncdiff_pl.parallel.stages.schedule import plan_step


def row(layout="1", gpus=1, loop_s=10.0, **figures):
    found = {"model": "svd", "layout": layout, "setting": layout, "gpus": gpus, "steps": 25, "compile": "none"}
    found |= {"capture": "off", "is_plain": 0, "exact_step_ms": 400.0, "machine": "4 x H200", "loop_s": loop_s}
    return found | figures


# -- what is measured -------------------------------------------------------------------------------------------------


def test_one_rank_comes_first_and_settings_that_mean_nothing_are_left_out():
    options = [
        "--layouts",
        "2x1",
        "1",
        "2x2",
        "--compile",
        "none",
        "full",
        "--capture",
        "off",
        "on",
        "--device",
        "cuda",
    ]
    options += ["--balance", "measured", "--warm-up-mode", "replicated", "relay"]
    one, halves, both = Layout(), Layout(cfg=2), Layout(2, cfg=2)
    assert plan(parse(options), 4) == [
        PLAIN,
        Job("1", one, "none", True),
        *(Job("1", one, "full", capture) for capture in (False, True)),
        *(Job("2x1", halves, compile, capture) for compile in ("none", "full") for capture in (False, True)),
        # full takes a whole denoiser
        *(
            Job("2x2", both, "none", capture, "measured", mode)
            for mode in ("replicated", "relay")
            for capture in (False, True)
        ),
    ]


def test_patches_come_in_their_modes():
    options = ["--layouts", "2xp2", "p4", "2", "--compile", "none", "blocks", "--device", "cpu"]
    options += ["--patch-mode", "full_sync", "stale_gn:0.3", "--folded", "no", "yes"]
    many, four, both = Layout(cfg=2, patches=2), Layout(patches=4), ("none", "blocks")
    modes = ("full_sync", 1), ("stale_gn", 0.3)
    assert plan(parse(options), 4) == [
        PLAIN,
        *(Job("2xp2", many, compile, mode=mode, portion=portion) for mode, portion in modes for compile in both),
        *(Job("p4", four, compile, mode=mode, portion=portion) for mode, portion in modes for compile in both),
        *(Job("2", Layout(2), compile, folded=folded) for compile in ("none", "blocks") for folded in (False, True)),
    ]


def test_several_steps_at_a_time_are_compiled_whole_and_captured():
    options = ["--layouts", "2xsteps2", "steps4", "--compile", "none", "full", "--capture", "on", "--device", "cuda"]
    options += ["--balance", "measured", "--folded", "yes", "--warm-up-mode", "relay"]
    layouts = {"2xsteps2": Layout(cfg=2, steps=2), "steps4": Layout(steps=4)}
    found = plan(parse(options), 4)
    assert found[1:] == [Job(name, layout, kind, True) for name, layout in layouts.items() for kind in ("none", "full")]
    assert all(job.is_asynchronous and job.ranks == 4 for job in found[1:])
    assert [str(job) for job in found[1:3]] == ["2xsteps2, captured", "2xsteps2, full, captured"]


def test_other_sizes():
    large = sized(FULL["sdxl"], "256x192")
    assert large.latents == (4, 256, 192)
    assert (large.settings["height"], large.settings["width"]) == (2048, 1536)
    assert sized(FULL["svd"], None) is FULL["svd"]
    with pytest.raises(ValueError, match="--latents is 256; give ROWSxCOLUMNS"):
        sized(FULL["sdxl"], "256")
    assert sized(FULL["svd"], None, forward_chunk=5).forward_chunk == 5
    for name, chunk in (("svd", 4), ("svd", 0), ("animatediff", 4)):
        with pytest.raises(ValueError, match=f"--forward-chunk is {chunk}; it divides the frames of svd"):
            sized(FULL[name], None, forward_chunk=chunk)


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        (["--layouts", "3"], 4, "does not fit 4 ranks"),
        (["--layouts", "n2"], 4, "There is no layout n2"),
        (["--layouts", "p2", "--patch-mode", "syn_gn"], 4, "mode is syn_gn; give one of full_sync"),
        (["--layouts", "p2", "--patch-mode", "stale_gn:x"], 4, "stale_gn:x has a portion that is no number"),
        (["--layouts", "2x2", "--half-batch"], 4, "leaves nothing to split, and --layouts has 2x2; take 2"),
        (["--layouts", "2xsteps2", "--half-batch"], 4, "--layouts has 2xsteps2; take steps2"),
        (["--layouts", "steps3"], 4, "steps 3 = 3 ranks does not fit 4"),
        (["--layouts", "steps1"], 4, "There is no layout steps1"),
        (["--capture", "on", "--device", "cpu"], 1, "there is no GPU; take --capture off"),
    ],
)
def test_what_cannot_be_measured(options, ranks, said):
    with pytest.raises(ValueError, match=said):
        plan(parse(options), ranks)


@pytest.mark.parametrize("warm_up", [1, 3])
@pytest.mark.parametrize("steps", [4, 9, 25, 50])
def test_a_short_run_meets_every_phase(steps, warm_up):
    def phases(number):
        found, parity = set(), 0
        for step in range(number):
            step = plan_step(step, number, stages=2, stride=1, warm_up=warm_up, output_stage=1)
            parity = 0 if step.is_exact else 1 - parity
            found.add((step.is_exact, step.fills, step.exchanges, parity))
        return found

    assert phases(short_run(steps, warm_up)) == phases(steps)
    assert short_run(steps, warm_up) <= warm_up + 6


@pytest.mark.parametrize(("steps", "at_a_time", "short"), [(25, 2, 9), (50, 8, 12), (50, 9, 12), (6, 8, 6)])
def test_a_short_run_has_a_round_of_all_ranks(steps, at_a_time, short):
    assert short_run(steps, 3, at_a_time) == short


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_a_loop_is_the_same_again_and_in_halves(name):
    model = Denoising(TINY[name], torch.device("cpu"), torch.float32)
    latents = model.loop(2)
    assert latents.shape == (1, *TINY[name].latents)
    assert latents.isfinite().all()
    # the guidance batch is one that can be split
    handle = parallelize(model.denoiser, scheduler=model.scheduler, cfg=2, simulate=True)
    assert relative_deviation(model.loop(2), latents) < 1e-5
    handle.remove()
    assert model.loop(2).equal(latents)


@pytest.mark.parametrize("name", list(TINY))
def test_half_a_batch_is_the_guided_half(name):
    estimates = []
    for is_half in (False, True):
        model = Denoising(sized(TINY[name], None, is_half), torch.device("cpu"), torch.float32)
        model.denoiser.register_forward_hook(lambda module, args, output: estimates.append(output[0]))
        model.loop(1)
    assert relative_deviation(estimates[1], estimates[0][1:]) < 1e-5


@pytest.mark.parametrize("name", list(FULL))
def test_sizes_are_those_of_the_configs(name):
    settings = FULL[name].settings
    height, width = settings["height"], settings["width"]
    assert FULL[name].latents[-2:] == (height // 8, width // 8)
    assert FULL[name].steps == settings["num_inference_steps"]
    frames = settings.get("num_frames")
    assert frames is None or frames in FULL[name].latents


def test_a_whole_pipeline():
    model = Denoising(TINY["svd"], torch.device("cpu"), torch.float32, with_pipeline=True)
    assert 0 < model.whole(1) < 60
    model.put_away()


# -- times and rows ---------------------------------------------------------------------------------------------------


def test_marks_are_read_as_steps(monkeypatch):
    times = iter([0.0, 0.001, 0.004, 0.006, 0.007, 0.012, 0.014])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    marks = Marks(torch.device("cpu"))
    for _ in range(7):
        marks.add()
    run = marks.read(1.5)
    assert run.seconds == 1.5
    assert run.steps_ms == pytest.approx([6, 8])
    assert run.denoiser_ms == pytest.approx([3, 5])


def test_steps_after_warm_up_are_told_from_exact_ones():
    runs = [
        Run(1.0, [90, 20 + n, 20 + n, 7, 6, 8, 5], [80, 19, 19, 6, 5, 7, 4], [1, 1, 1, 2, 2, 2, 3]) for n in (0, 1, 9)
    ]
    # the first step prepares the sample, the last one sends nothing
    found = {"exact_steps": 3, "exact_step_ms": 21, "asynchronous_step_ms": 7, "last_ms": 5, "timed_loops": 3}
    assert figures(runs, 3) == found | {"glue_ms": 1, "host_ms": 2}
    assert "asynchronous_step_ms" not in figures(runs, 7)
    ahead = figures([Run(1.0, [9, 9, 12, 2, 14, 4, 3], [0] * 7, [0] * 7)], 2, stride=2)
    assert ahead["asynchronous_step_ms"] == 8
    assert "last_ms" not in ahead


@pytest.mark.parametrize(
    ("left", "exact", "asynchronous", "outside"),
    [
        # a last round of 1 step is exact, and one of 2 is no measure of 3
        ([30, 1, 2, 36, 1, 2, 20], 4, 12, 1),
        ([30, 1, 2, 36, 1, 2, 20, 1], 3, 12, 1),
        ([27, 1], 3, 14, 0.5),
    ],
)
def test_a_step_of_a_round_has_its_share_of_it(left, exact, asynchronous, outside):
    steps = [90, 20, 22, *left]
    denoiser = [time if time > 2 else 0 for time in steps]
    found = figures_of_rounds([Run(1.0, steps, denoiser, [2 * time for time in steps])] * 3, 3, 3)
    assert found == {
        "exact_steps": exact,
        "exact_step_ms": 21,
        "asynchronous_step_ms": asynchronous,
        "timed_loops": 3,
        "glue_ms": outside,
        "host_ms": 2 * asynchronous,
    }


def test_rounds_that_are_not_there():
    run = Run(1.0, [9, 2, 3, 4], [0, 1, 1, 1], [0, 1, 1, 1])
    assert figures_of_rounds([run], 3, 2) == figures([run], 4)
    assert "asynchronous_step_ms" not in figures([run], 4)


def test_rows_are_compared_with_one_gpu():
    alone = [
        row(is_plain=1, pipeline_s=20.0, peak_gib=10.0),
        row(compile="blocks", capture="on", loop_s=5.0, exact_step_ms=200.0),
        row(compile="blocks", loop_s=8.0),
        row(model="sdxl", compile="blocks", loop_s=1.0),
    ]
    many = row("2x2", 4, 2.0, compile="blocks", capture="on", asynchronous_step_ms=60.0, pipeline_s=5.0, peak_gib=9.0)
    assert compare_layouts(many, alone) == {
        "over_eager": 5.0,
        "over_compiled": 2.5,
        "pipeline_share_of_eager": 0.25,
        "peak_of_eager": 0.9,
        # 60 ms instead of 200 / 4
        "of_ideal": 1.2,
    }
    assert compare_layouts(row("2x2", 4, None), alone) == {}


def test_rows_are_kept_as_they_come(tmp_path, capsys):
    path, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    table = Table(path)
    table.add(row(is_plain=1))
    # digits that rounding twice would change
    table.add(row("2x2", 4, 2.5, slowest_share=0.521, fastest_share=0.479, deviation=1e-3, exposed_ms=24.0149996))
    Table(path).add(row("4", 4, None, failure="rank 1: RuntimeError: no memory"))
    text = capsys.readouterr().out
    assert "| svd | 2x2 | 4 | 2x2 | 2.5 | 4 |" in text
    assert "| 52.1% / 47.9% |" in text
    assert "| svd | 4 | 4 | 4 | failed: rank 1: RuntimeError: no memory |" in text
    with path.open("a") as file:
        file.write("svd,2x1,2x1,2,cut o")
    rows = read_rows(path)
    assert [(found["layout"], found["loop_s"]) for found in rows] == [(1, 10.0), ("2x2", 2.5), (4, None)]
    assert rows[1]["over_eager"] == 4
    assert line(rows[1]) in text
    assert [found["layout"] for found in newest([*rows, rows[0]])] == ["2x2", 1]
    machines = [rows[0] | {"machine": machine} for machine in ("2 x GPU", "4 x GPU", "4 x another")]
    assert [found["machine"] for found in newest(machines)] == ["4 x GPU", "4 x another"]
    plot(rows, picture)
    assert picture.stat().st_size > 10_000
    path.write_text("model,ms\nsvd,3\n")
    with pytest.raises(ValueError, match="holds another table"):
        Table(path)


# -- ranks ------------------------------------------------------------------------------------------------------------


class OneRank:
    rank = 0

    def gather(self, value):
        return [value]


def test_the_clock_ends_the_process_and_keeps_what_is_there(capsys):
    done, left = threading.Event(), []
    clock = Clock(0.05, OneRank(), lambda: left.append("drawn"), lambda status: (left.append(status), done.set()))
    assert not clock.is_over
    assert done.wait(10)
    assert clock.is_over
    assert left == ["drawn", 0]
    assert "time is up after 0.05 s" in capsys.readouterr().out
    never = Clock(None, OneRank(), lambda: None)
    never.stop()
    assert not never.is_over


FAILS_ONCE = """
import os, sys
import benchmark_denoising as script

loop, failures = script.Denoising.loop, []

def broken(self, steps, mark=lambda: None):
    if self.kind.config == "sdxl_n2" and os.environ["RANK"] == "1" and not failures:
        failures.append(1)
        raise RuntimeError("no memory")
    return loop(self, steps, mark)

script.Denoising.loop = broken
script.main()
"""


def test_two_ranks_one_of_which_fails_once(tmp_path):
    options = "--tiny --models sd21 sdxl --layouts 2x1 2 steps2 --balance measured --steps 7 --repeats 1"
    said = run_on_two(FAILS_ONCE, f"{options} --csv rows.csv --plot rows.png", tmp_path)
    rows = read_rows(tmp_path / "rows.csv")
    assert said[0].splitlines()[2:] == [line(found) for found in rows]
    plain, halves, stages, steps, failed, *after = rows
    assert [found["model"] for found in rows] == ["tiny sd21"] * 4 + ["tiny sdxl"] * 4
    assert all(found["loop_s"] > 0 and found["deviation"] >= 0 and found["over_eager"] > 0 for found in rows[:4])
    assert (plain["over_eager"], plain["deviation"]) == (1, 0)
    assert halves["deviation"] < 1e-5
    assert 1e-3 < stages["deviation"] < 1
    assert (halves["exact_steps"], stages["exact_steps"]) == (7, 3)
    assert stages["asynchronous_step_ms"] > 0 < stages["exact_step_ms"]
    assert stages["mib_per_step"] > 0 == halves["mib_per_step"]
    assert stages["slowest_ms"] + stages["exposed_ms"] == pytest.approx(stages["asynchronous_step_ms"], rel=1e-3)
    assert 0.3 < stages["fastest_share"] <= 0.5 <= stages["slowest_share"] < 0.7
    assert (steps["steps_at_a_time"], steps["warm_up"], steps["exact_steps"], steps["stages"]) == (2, 3, 3, 1)
    assert 1e-4 < steps["deviation"] < stages["deviation"]
    assert steps["asynchronous_step_ms"] > 0 < steps["exact_step_ms"]
    # each rank sends an estimate of both halves a round: [2, 4, 16, 16] in float32
    assert steps["mib_per_step"] == 2 * 2 * 4 * 16 * 16 * 4 / 2 / 2**20
    assert steps["slowest_ms"] is steps["exposed_ms"] is None
    assert failed["failure"] == "rank 1: RuntimeError: no memory"
    # there is nothing to compare the others with, but they are measured
    assert all(found["loop_s"] > 0 and found["over_eager"] is None for found in after)
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert list(rows[0]) == list(COLUMNS)
