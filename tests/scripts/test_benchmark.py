import argparse
import json
from pathlib import Path

import benchmark
import pytest
import yaml
from PIL import Image

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.strategies import AsyncDiffStrategy, PatchStrategy


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("1", Layout()),
        ("4", Layout(4)),
        ("3s2", Layout(3, 2)),
        ("2x1", Layout(1, 1, 2)),
        ("2x2", Layout(2, 1, 2)),
        ("p4", Layout(patches=4)),
        ("p16", Layout(patches=16)),
        ("2xp2", Layout(cfg=2, patches=2)),
    ],
)
def test_names_of_layouts(name, layout):
    assert benchmark.parse_layout(name) == layout


@pytest.mark.parametrize("name", ["", "n2", "2x", "12", "2x2x2", "p", "p2s2", "2p2"])
def test_no_names_of_layouts(name):
    with pytest.raises(ValueError, match="There is no layout"):
        benchmark.parse_layout(name)


@pytest.mark.parametrize(
    ("config", "pictures"),
    [
        ("svd_n2", {"image": (1024, 576)}),
        ("sd15_n2", {}),
        ("flux_n2", {}),
        ("upscale_n2", {"image": (128, 128)}),
        ("sdxl_inpaint_n2", {"image": (1024, 1024), "mask_image": (1024, 1024)}),
        ("sdxl_controlnet_n2", {"control_image": (1024, 1024)}),
        ("animatediff_n2", {}),
    ],
)
def test_data_are_made_up_in_the_size_of_the_run(config, pictures, tmp_path):
    options = argparse.Namespace(samples=3, devices=4, accelerator="cpu")
    job = benchmark.make_job(config, "2", options, [], tmp_path)
    assert job.ranks == 4
    settings = yaml.safe_load((tmp_path / f"{config}-layout-2.yaml").read_text())
    assert settings["model"]["init_args"]["weights"] == "random"
    assert settings["trainer"]["devices"] == 4
    path = settings["data"]["init_args"]["path"]
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    # two pipelines of two ranks
    assert len({row["id"] for row in rows}) == 6
    found = {
        name: Image.open(Path(path).parent / row).size for name, row in rows[0].items() if name not in ("id", "prompt")
    }
    assert found == pictures


PCPP = {"mode": "corrected_async_gn", "warm_up": 4, "portion": 0.3}


@pytest.mark.parametrize(
    ("config", "layout", "kind", "settings"),
    [
        ("sdxl_n2", "p4", PatchStrategy, {"warm_up": 3, "patches": 4, "cfg": 1}),
        ("sdxl_pcpp4", "p2", PatchStrategy, PCPP | {"patches": 2, "cfg": 1}),
        ("sdxl_pcpp4", "2xp2", PatchStrategy, PCPP | {"patches": 2, "cfg": 2}),
        ("sdxl_pcpp4", "1", PatchStrategy, PCPP | {"patches": 1, "cfg": 1}),
        ("sdxl_pcpp4", "", PatchStrategy, PCPP | {"patches": 4}),
        ("sdxl_pcpp4", "2x2", AsyncDiffStrategy, {"warm_up": 4, "stages": 2, "stride": 1, "cfg": 2}),
        ("svd_n3s2", "1", AsyncDiffStrategy, {"warm_up": 3, "stages": 1, "stride": 1, "cfg": 1}),
    ],
)
def test_a_config_in_stages_and_in_patches(config, layout, kind, settings, tmp_path):
    options = argparse.Namespace(samples=1, devices=None, accelerator="cpu")
    job = benchmark.make_job(config, layout, options, [], tmp_path)
    written = yaml.safe_load(Path(job.arguments[2]).read_text())["trainer"]
    found = written["strategy"]
    assert found["class_path"] == f"asyncdiff_pl.strategies.{kind.__name__}"
    assert found["init_args"] == settings
    # as many ranks as the strategy itself takes
    assert written["devices"] == job.ranks == kind(**settings)._layout.pipeline_ranks


@pytest.mark.parametrize(
    ("layout", "result", "exact"),
    [
        ("1", {"warm_up": "3"}, 10),
        ("1", {"warm_up": "4", "mode": "stale_gn"}, 10),
        ("2x1", {"warm_up": "3"}, 10),
        ("2", {"warm_up": "3"}, 3),
        ("2", {"warm_up": "until drift 0.1"}, None),
        ("p2", {"warm_up": "4", "mode": "full_sync"}, 10),
        ("p2", {"warm_up": "4", "mode": "stale_gn"}, 4),
        ("p2", {"warm_up": "4", "mode": "naive"}, 0),
    ],
)
def test_which_steps_are_exact(layout, result, exact):
    assert benchmark._exact_steps(benchmark.parse_layout(layout), result, 10) == exact


def test_a_table_with_fewer_columns_is_gone_on_with(tmp_path, capsys):
    options = argparse.Namespace(samples=1, devices=None, accelerator="cpu")
    job = benchmark.make_job("sdxl_pcpp4", "p2", options, [], tmp_path)
    table = tmp_path / "rows.csv"
    old = dict.fromkeys(("config", "layout", "gpus", "steps", *benchmark.COLUMNS.values()), "1")
    for row in (old, old | {"mode": "full_sync"}):
        benchmark._tell(job, [row], table)
    header, first, second = table.read_text().splitlines()
    assert header.endswith(",mode")
    assert first + "full_sync" == second
    assert first.endswith(",")


def test_a_layout_that_does_not_fit(tmp_path):
    options = argparse.Namespace(samples=2, devices=3, accelerator="gpu")
    assert benchmark.make_job("svd_n2", "2", options, [], tmp_path).ranks == 2
    with pytest.raises(ValueError, match="svd_n2 in the layout 2x2 needs 4 GPUs"):
        benchmark.make_job("svd_n2", "2x2", options, [], tmp_path)
