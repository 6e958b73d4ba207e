"""Every packaged config for `predict` is right as it is: its settings exist, its classes are made, its checks pass."""

import json

import pytest
import yaml
from PIL import Image

from asyncdiff_pl.cli import command as command_module
from asyncdiff_pl.cli.overview import CONFIGS, is_training, packaged_configs
from asyncdiff_pl.data.coco import DEMO_FOLDER
from asyncdiff_pl.parallel import Layout

NAMES = [name for name in packaged_configs() if not is_training(name)]
ISSUE = {
    *("sd15_n2", "sd21_n2", "sd21_n3", "sd21_n4", "sdxl_n2", "sdxl_n3", "sdxl_n4", "sdxl_cfg2_n2", "sdxl_inpaint_n2"),
    *("sdxl_controlnet_n2", "sd3_n2", "sd3_n4", "upscale_n2", "animatediff_n2", "animatediff_n3", "animatediff_n4"),
    *("sdxl_patch4", "sdxl_pcpp4", "svd_patch4", "animatediff_patch2", "sd15_patch2", "demo_patch", "sdxl_coco"),
    *("dit_n2", "flux_n2", "demo_image", "demo", "svd_n2", "svd_n3", "svd_n4", "svd_cfg2_n2", "svd_n3s2", "svd_eval"),
    *("svd_steps2", "svd_cfg2_steps2", "sdxl_cfg2_steps2", "demo_steps"),
    *("ddpm_pictures", "demo_ddpm_pictures"),
    *("dit_parataa8", "sd15_parataa4", "sd15_paradigms4", "demo_parataa", "demo_from_trajectory"),
}


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_all_configs_are_there():
    assert set(NAMES) >= ISSUE


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_it_is_and_has_the_devices_of_its_layout(name):
    first = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    config = read(name)
    strategy = config["trainer"]["strategy"]["init_args"]
    axes = {axis: strategy.get(axis, 1) for axis in ("stages", "stride", "cfg", "patches", "steps")}
    layout = Layout(**axes, time=strategy.get("ranks", 1))
    assert layout.ranks_per_half > 1 or name in ("svd_sequential", "ddpm_pictures", "demo_ddpm_pictures")
    assert config["trainer"]["devices"] == layout.pipeline_ranks
    assert config["trainer"]["logger"]["init_args"]["name"] == name


@pytest.fixture
def check(command, monkeypatch, tmp_path):
    """Parses a config, makes its classes and checks its input, with data that are there, and runs nothing."""
    seen = []
    monkeypatch.setattr(command_module, "describe_run", lambda *parts: seen.append(parts) or "")

    def check(name):
        data = read(name)["data"]
        kind = data["class_path"].rpartition(".")[2]
        arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.accelerator", "cpu"]
        if kind == "CocoCaptions":
            arguments += ["--data.annotations", "demo"]
            if data["init_args"]["images_dir"] is not None:
                arguments += ["--data.images_dir", "demo"]
        if "frechet_distance" in read(name):
            arguments += ["--frechet_distance.real", str(DEMO_FOLDER / "images")]
        elif kind == "PromptFile" and data["init_args"]["path"] != "demo":
            arguments += ["--data.path", str(prompts(name))]
        if "initial_trajectory" in read(name)["trainer"]["strategy"]["init_args"]:
            arguments += ["--trainer.strategy.init_args.initial_trajectory", str(tmp_path)]
        if name == "demo_ddpm_pictures":
            # what a run of `fit` leaves is not there
            arguments += ["--model.pretrained", "google/ddpm-cifar10-32"]
        with pytest.raises(SystemExit) as end:
            command_module.run(["predict", *arguments, "--model.weights", "random", "--dry-run"])
        assert end.value.code == 0
        return seen.pop()

    def prompts(name):
        pictures = [column for column, names in COLUMNS.items() if name in names]
        row = {"prompt": "a dog"} | {column: f"{column}.png" for column in pictures}
        for column in pictures:
            Image.new("RGB", (1024, 1024)).save(tmp_path / f"{column}.png")
        (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
        return tmp_path / "prompts.jsonl"

    return check


COLUMNS = {
    "image": ("sdxl_inpaint_n2", "upscale_n2"),
    "mask_image": ("sdxl_inpaint_n2",),
    "control_image": ("sdxl_controlnet_n2",),
}
"""Pictures that a config's prompt file names."""


@pytest.mark.parametrize("name", NAMES)
def test_a_config_passes_the_checks_of_a_run(check, name):
    trainer, module, data = check(name)
    assert trainer.world_size == read(name)["trainer"]["devices"]
    assert data.num_samples > 0
    # what a sample has is what the pipeline takes
    sample = data.samples()[0]
    if hasattr(module, "check_inputs"):
        module.check_inputs(sample.inputs)
        assert module.group([sample]) == [[sample]] or module._foreknown.template is None
