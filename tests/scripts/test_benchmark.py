import argparse
import json
from pathlib import Path

import benchmark
import pytest
import yaml
from PIL import Image

from asyncdiff_pl.parallel import Layout


@pytest.mark.parametrize(
    ("name", "layout"),
    [("1", Layout()), ("4", Layout(4)), ("3s2", Layout(3, 2)), ("2x1", Layout(1, 1, 2)), ("2x2", Layout(2, 1, 2))],
)
def test_names_of_layouts(name, layout):
    assert benchmark.parse_layout(name) == layout


@pytest.mark.parametrize("name", ["", "n2", "2x", "12", "2x2x2"])
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


def test_a_layout_that_does_not_fit(tmp_path):
    options = argparse.Namespace(samples=2, devices=3, accelerator="gpu")
    assert benchmark.make_job("svd_n2", "2", options, [], tmp_path).ranks == 2
    with pytest.raises(ValueError, match="svd_n2 in the layout 2x2 needs 4 GPUs"):
        benchmark.make_job("svd_n2", "2x2", options, [], tmp_path)
