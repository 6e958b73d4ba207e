import subprocess
import sys

import pytest

from asyncdiff_pl.cli.overview import CONFIGS, find_config, packaged_configs, with_named_configs

DEMO = str(CONFIGS / "demo.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config", "demo"], ["--config", DEMO]),
        (["--config=demo", "--data.height", "64"], [f"--config={DEMO}", "--data.height", "64"]),
        (["-c", "demo.yaml"], ["--config", DEMO]),
        (["--config", "configs/demo.yaml"], ["--config", DEMO]),
        (["--data.images_dir", "demo"], ["--data.images_dir", "demo"]),
        (["--config"], ["--config"]),
    ],
)
def test_names_of_packaged_configs_become_paths(monkeypatch, tmp_path, given, expected):
    monkeypatch.chdir(tmp_path)
    assert with_named_configs(["predict", *given]) == ["predict", *expected]


def test_a_file_of_the_users_own_goes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("model: {}")
    assert find_config("demo") == "demo"


def test_resume_alone_takes_the_settings_of_the_stopped_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}")
    config = ["--config", str(tmp_path / "config.yaml")]
    assert with_named_configs(["predict", "--resume", str(tmp_path)]) == ["predict", *config, "--resume", str(tmp_path)]
    assert with_named_configs(["predict", f"--resume={tmp_path}"]) == ["predict", *config, f"--resume={tmp_path}"]
    with_config = ["predict", "--config", DEMO, "--resume", str(tmp_path)]
    assert with_named_configs(with_config) == with_config


def test_resume_of_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.yaml; add the `--config`"):
        with_named_configs(["predict", "--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "near"),
    [("configs/demo_imag.yaml", r" \(demo_image, "), ("sdxl_n22", r" \(sdxl_n2, "), ("zzz", ": .* --help` lists them")],
)
def test_an_unknown_name_is_told_with_those_like_it(name, near):
    with pytest.raises(ValueError, match=rf"There is no config {name}; .* one of the package's{near}") as error:
        with_named_configs(["predict", "--config", name])
    assert len(str(error.value)) < 300


def test_every_config_says_in_its_first_line_what_it_is():
    for name in packaged_configs():
        assert (CONFIGS / f"{name}.yaml").read_text().startswith("# "), name


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["predict", "--config", "demmo"], 2)])
def test_help_and_a_wrong_name_do_not_wait_for_torch(arguments, status):
    # -X importtime lists every module that was imported
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "asyncdiff_pl", *arguments], capture_output=True, text=True
    )
    assert process.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time" in line}
    assert not imported & {"torch", "lightning", "diffusers", "transformers"}


@pytest.mark.parametrize(
    ("subcommand", "name", "other"), [("fit", "demo", "predict"), ("predict", "train/clip", "fit")]
)
def test_a_config_of_the_other_subcommand(subcommand, name, other):
    with pytest.raises(ValueError, match=rf"{name} is a config of `{other}`: .* {other} --config {name}"):
        with_named_configs([subcommand, "--config", name])
