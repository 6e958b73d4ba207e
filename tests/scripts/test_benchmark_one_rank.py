import pytest
import torch
import torch.distributed as dist
from benchmark_one_rank import RANK_COLUMNS, SHOWN, Alone, OneRankBench, main
from denoising_jobs import parse, plan
from denoising_models import TINY, Denoising
from denoising_report import Table, read_rows

from asyncdiff_pl.parallel import recordings
from asyncdiff_pl.parallel.capture import recorder_for

OPTIONS = ["--tiny", "--device", "cpu", "--models", "sd21", "--steps", "6", "--repeats", "1"]


def rows_of(number, path, *layouts):
    profiles = ["--profile", str(path.parent / "profiles")]
    options = parse([*OPTIONS, "--layouts", *layouts, "--warm-up-mode", "replicated", "relay", *profiles])
    world = Alone("cpu", 2, number)
    try:
        bench = OneRankBench(world, options)
        jobs = [job for job in plan(options, 2) if job.ranks == 2]
        bench.measure_model("sd21", jobs, Table(path, RANK_COLUMNS, SHOWN, lambda row, others: {}))
    finally:
        world.close()
    return read_rows(path, RANK_COLUMNS)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_alone_does_what_it_does_among_others(tmp_path, capsys, number):
    found = rows_of(number, tmp_path / "rows.csv", "2", "p2", "steps2")
    assert [str(row["setting"]) for row in found] == ["2", "2, relay", "p2, full_sync", "steps2"]
    for row in found:
        assert (row["rank"], row["ranks"], row["gpus"], row["failure"]) == (number, 2, 2, None)
        assert row["loop_s"] > 0
        # a process without torchrun
        assert str(row["command"]).startswith("python scripts/benchmark_one_rank.py")
        assert row["exact_steps"] == {"p2": 6, "steps2": 4}.get(row["layout"], 3)
    said = capsys.readouterr()
    assert f"| tiny sd21 | {number} | 2, relay | 2 |" in said.out
    assert f"tiny sd21, p2, full_sync, rank {number}: a step " in said.err
    tables = {path.name for path in (tmp_path / "profiles").iterdir()}
    assert tables == {f"tiny_sd21_{name}_rank_{number}.csv" for name in ("2", "2_relay", "p2_full_sync", "steps2")}
    # bytes are those of all ranks, whoever tells of them
    model = Denoising(TINY["sd21"], torch.device("cpu"), torch.float32)
    handle = model.install(None, stages=2, simulate=True)
    model.loop(6)
    sent = handle.bytes_per_step / 2**20
    assert [row["mib_per_step"] for row in found[:2]] == pytest.approx([sent, sent], rel=1e-4)
    handle.remove()
    assert not dist.is_initialized()
    assert recordings.recorder_for is recorder_for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "4"], "--rank is 4, and there are 4; give one from 0 to 3"),
        (["--layouts", "2"], "2 is not for 4 ranks"),
        (["--layouts", "t4"], "t4 is not for 4 ranks, or shares layers"),
        (["--whole-pipeline"], "A rank alone has no whole pipeline"),
    ],
)
def test_what_a_rank_alone_does_not_tell(options, said):
    with pytest.raises(SystemExit, match=said):
        main([*OPTIONS, *options])
