import json
from pathlib import Path

import pytest
import torch
import yaml
from benchmark_parallel_in_time import (
    COLUMNS,
    FULL,
    ITERATIONS,
    SHOWN,
    TINY,
    SolverJob,
    TimeBench,
    compare,
    figures_of_solving,
    parse,
    plan,
)
from denoising_jobs import PLAIN, Job
from denoising_models import Denoising
from denoising_ranks import World
from denoising_report import Table, line, read_rows
from denoising_times import Run, relative_deviation
from fake_graph import FakeRecorder, captured
from script_ranks import run_on_two

from asyncdiff_pl.cli.overview import find_config
from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.parallel import Layout, parallelize

CPU = torch.device("cpu")


# -- what is measured -------------------------------------------------------------------------------------------------


def test_rows():
    options = ["--device", "cuda", "--compile", "none", "blocks"]
    kinds = ("none", "blocks")
    assert plan(parse(options), 4) == [
        PLAIN,
        *(Job("1", Layout(), kind, True) for kind in kinds),
        *(Job("2x1", Layout(cfg=2), kind, True) for kind in kinds),
        *(SolverJob(f"parataa{ranks}", Layout(time=ranks), kind, True) for ranks in (1, 2, 4) for kind in kinds),
    ]
    # without a GPU nothing is captured, and one rank is plain diffusers
    alone = plan(parse(["--device", "cpu", "--ranks", "1"]), 1)
    assert alone == [PLAIN, SolverJob("parataa1", Layout())]
    assert [job.is_plain for job in alone] == [True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "1", "3"], "time 3 = 3 ranks does not fit 4 ranks"),
        (["--ranks", "0"], "ranks is 0; give 1 or more"),
        (["--batch", "0"], "batch is 0; give 1 or more"),
        (["--iterations", "0"], "max_iterations is 0; give 1 or more"),
    ],
)
def test_what_cannot_be_measured(options, said):
    with pytest.raises(ValueError, match=said):
        plan(parse(["--device", "cpu", *options]), 4)


@pytest.mark.parametrize(
    ("name", "network", "scale"), [("dit", "dit-xl-2-256/transformer", 8), ("sd15", "sd15/unet", 8)]
)
def test_sizes_are_those_of_the_configs(name, network, scale):
    config = yaml.safe_load(Path(find_config(FULL[name].config)).read_text())["model"]["init_args"]
    size = json.loads((MODELS_FOLDER / network / "config.json").read_text())["sample_size"]
    assert FULL[name].latents == (4, size, size)
    assert config.get("height", scale * size) == scale * size
    assert (FULL[name].steps, FULL[name].guidance) == (config["num_inference_steps"], config["guidance_scale"])
    assert ITERATIONS[name] < FULL[name].steps / 3


def test_dit_is_told_a_class_and_none():
    model = Denoising(TINY["dit"], CPU, torch.float32)
    latents = model.loop(3)
    assert latents.shape == (1, 4, 8, 8)
    assert latents.isfinite().all()
    handle = parallelize(model.denoiser, scheduler=model.scheduler, cfg=2, simulate=True)
    assert relative_deviation(model.loop(3), latents) < 1e-5
    handle.remove()
    seen = []
    model.denoiser.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model.loop(1)
    # learned variance beside the estimate; the halves differ, or guidance would be nothing
    assert seen[0].shape == (2, 8, 8, 8)
    assert not seen[0][0].allclose(seen[0][1])


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_second_step_is_the_solution():
    runs = [Run(1.0, [30 + n, 500 + n, 2, 4], [29, 480 + n, 0, 0], [1] * 4) for n in (0, 20, 90)]
    assert figures_of_solving(runs, 10) == {
        "exact_step_ms": 50,
        "solving_ms": 500,
        "iteration_ms": 50,
        "later_step_ms": 3,
        "timed_loops": 3,
    }


def test_rows_are_compared_with_one_step_after_the_other():
    def row(layout, loop_s, compile="blocks", capture="on", is_plain=0, model="dit", peak_gib=2.0):
        found = {"model": model, "layout": layout, "compile": compile, "capture": capture, "is_plain": is_plain}
        return found | {"loop_s": loop_s, "peak_gib": peak_gib}

    others = [
        row("1", 8.0, "none", "off", is_plain=1),
        row("1", 6.0, "none"),
        row("1", None),
        row("1", 2.0),
        row("2x1", 1.0),
        row("1", 3.0, model="sd15"),
    ]
    solver = row("parataa2", 0.5, peak_gib=3.0)
    assert compare(solver, others) == {"over_eager": 16, "over_sequential": 4, "peak_of_eager": 1.5}
    # one rank that solves is no one step after the other
    assert compare(row("parataa1", 4.0), others[:2]) == {"over_eager": 2, "peak_of_eager": 1}
    assert compare(row("parataa1", None), others) == {}


# -- rows -------------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_recorded_before_times_are_taken(tmp_path):
    options = parse(["--device", "cpu", "--tiny", "--models", "dit", "--steps", "6", "--repeats", "2"])
    jobs = [SolverJob("parataa1", Layout(), capture=True)]
    bench, table = TimeBench(World("cpu", 1), options), Table(None, COLUMNS, SHOWN, compare)
    loops = []
    with captured(FakeRecorder()) as recorder:
        timed, bench.timed = bench.timed, lambda *given: loops.append(recorder.alive) or timed(*given)
        bench.measure_model("dit", jobs, table)
    (row,) = table.rows
    assert (row.get("failure"), row["refusal"]) == (None, "")
    # 10, 8, 6, 4 and 2 items, and the exact step's 2 are the same
    assert row["graphs"] == loops[0] == 5
    assert (row["timed_loops"], row["assumed_iterations"], row["iterations"], row["denoiser_calls"]) == (2, 9, 5, 16)


MAIN = "import benchmark_parallel_in_time as script; script.main()"


def test_two_ranks(tmp_path):
    options = "--tiny --models dit --steps 5 --iterations 4 --batch 3 --repeats 1 --csv rows.csv"
    said = run_on_two(MAIN, options, tmp_path)
    rows = read_rows(tmp_path / "rows.csv", COLUMNS)
    assert said[0].splitlines()[2:] == [line(row, SHOWN) for row in rows]
    assert [(row["layout"], row["gpus"]) for row in rows] == [(1, 1), ("2x1", 2), ("parataa1", 1), ("parataa2", 2)]
    plain, _, *solvers = rows
    assert (plain["deviation"], plain["over_sequential"], plain["assumed_iterations"]) == (0, 1, None)
    # all steps but one are as many iterations as there can be: the result is exact
    assert all(row["deviation"] < 1e-5 for row in rows)
    for row in solvers:
        assert (row["assumed_iterations"], row["iterations"], row["denoiser_calls"]) == (4, 4, 1 + 4 + 3 + 2 + 1)
        assert (row["order"], row["window"], row["memory"], row["batch"]) == (100, 100, 2, 3)
        assert 0 < row["iteration_ms"] == pytest.approx(row["solving_ms"] / 4, rel=1e-4)
        assert row["over_sequential"] == row["over_eager"] > 0
    # each rank sends 4, 3, 2 and 1 outputs of [8, 8, 8] in float32, for each of 4 steps
    sent = 2 * (4 + 3 + 2 + 1) * 8 * 8 * 8 * 4 / 4 / 2**20
    assert [row["mib_per_step"] for row in solvers] == [0, pytest.approx(sent, rel=1e-5)]
    assert plain["command"].startswith("torchrun --nproc_per_node 2 scripts/benchmark_parallel_in_time.py --tiny")
