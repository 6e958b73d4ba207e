"""Deviations of layouts from one rank, beside the original's."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableVideoDiffusionPipeline
from measure_deviation import ORIGINAL_NAME, Row, deviations, jobs_of, measure, merge, read_rows, write_rows
from scene_samples import load


def test_deviation_is_each_samples_own():
    exact = torch.randn(3, 4, 2, 2)
    found = deviations(exact * torch.tensor([1.0, 1.5, 0.0]).view(3, 1, 1, 1), exact)
    assert found.tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("model", "kind"), [("tiny-svd", StableVideoDiffusionPipeline), ("tiny-sd", StableDiffusionPipeline)]
)
def test_the_originals_cuts_own_all_of_the_network(model, kind):
    unet = load(kind, model, "float32", "cpu").unet
    for job in jobs_of(model):
        if job.name == ORIGINAL_NAME:
            assert len(job.settings["cut"]) == job.gpus
            owned = [name for stage in job.settings["cut"] for name in stage]
            assert all(unet.get_submodule(name) is not None for name in owned)


def test_shards_go_on_where_they_were_and_are_put_together(tmp_path, capsys):
    settings = {"models": ["tiny-sd"], "samples": 2, "sd_steps": 4, "batch_size": 2, "device": "cpu"}
    # the first layout alone
    measure(tmp_path, "0/10", **settings)
    path = tmp_path / "deviation_0of10.csv"
    before = path.read_text()
    assert len(before.splitlines()) == 1 + 2
    path.write_text(before + "tiny-sd,4,0,4,4 sta")
    measure(tmp_path, "0/10", **settings)
    assert path.read_text() == before
    assert "original AsyncDiff" in capsys.readouterr().out
    merge(tmp_path)
    assert "| 2 | original AsyncDiff | " in capsys.readouterr().out


def test_tables_pair_layouts_with_the_originals(tmp_path, capsys):
    rows = []
    for gpus, name, more in ((2, ORIGINAL_NAME, 0), (2, "2 stages", 0.01), (2, "cfg 2", -0.1), (4, "4 stages", 0.3)):
        rows += [Row("tiny-sd", 50, 0, gpus, name, sample, 0.1 + sample + more) for sample in range(4)]
    write_rows(tmp_path / "deviation_0of2.csv", rows[::2])
    write_rows(tmp_path / "deviation_1of2.csv", rows[1::2])
    # a layout in work, and a line that was cut off
    write_rows(tmp_path / "deviation_1of2.csv", [Row("tiny-sd", 50, 0, 4, "cfg 2 x 2 stages", 0, 0.1)])
    with (tmp_path / "deviation_1of2.csv").open("a") as file:
        file.write("tiny-sd,50,0,4,cfg 2 x 2")
    assert len(read_rows(tmp_path)) == 17
    merge(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| 2", "original AsyncDiff"],
        ["| 2", "2 stages"],
        ["| 2", "cfg 2"],
        ["| 4", "4 stages"],
    ]
    assert [line.split(" | ")[3] for line in lines[1:3]] == ["+0.0100 ± 0.0000 |", "-0.1000 ± 0.0000 |"]


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="run `measure` into it first"):
        merge(tmp_path)
