import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from asyncdiff_pl.models import embedded
from asyncdiff_pl.models.clip import is_random, load_clip
from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.random_weights import build_random_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "embed_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("embed_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "models"
    shutil.copytree(embedded.MODELS_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(embedded, "MODELS_FOLDER", folder)
    return folder


@pytest.fixture
def transformer(package, tmp_path):
    """An export of dit-transformer."""
    model = build_random_model(DiTTransformer2DModel, find_component("dit-transformer"), torch.float32)
    model.save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_network_comes_into_the_package_in_float16(script, package, transformer, capsys):
    config = transformer / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/where/it/was", "sample_size": 16})
    )
    script.main([f"dit-transformer={transformer}"])
    component = find_component("dit-transformer")
    (weights,) = component.glob("*.safetensors")
    expected = load_file(transformer / "diffusion_pytorch_model.safetensors")
    for key, value in load_file(weights).items():
        assert torch.equal(value, expected[key].half()), key
    assert json.loads((component / "config.json").read_text())["sample_size"] == 16
    assert "/where/it/was" not in (component / "config.json").read_text()
    assert [path.name for path in package.iterdir() if path.name.startswith(".")] == []
    printed = capsys.readouterr().out
    assert "dit-transformer: 2,401,072 parameters" in printed
    assert any(line.split()[0] == "dit-transformer" and "4.8" in line for line in printed.splitlines() if "MB" in line)


def test_clip_brings_its_tokenizer(script, package, tmp_path):
    model, processor = load_clip("tiny-clip")
    assert is_random("tiny-clip")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export" / "vocab.json").exists()
    script.main([f"scene-clip={tmp_path / 'export'}"])
    assert not is_random("tiny-clip")
    again, its_processor = load_clip("tiny-clip")
    assert its_processor.tokenizer("a red star").input_ids == processor.tokenizer("a red star").input_ids
    assert torch.equal(again.text_projection.weight, model.text_projection.weight.half().float())
    # one tokenizer alone, and the description is still there
    assert {path.name for path in find_component("scene-clip").iterdir()} == {
        *("README.md", "config.json", "model.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }


def other_network(export):
    shutil.rmtree(export)
    UNet2DConditionModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                         mid_block_type=None).save_pretrained(export)  # fmt: skip


def weights_of(export, change):
    path = export / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (other_network, "holds a UNet2DConditionModel, but dit-transformer is a DiTTransformer2DModel"),
        (lambda export: (export / "config.json").unlink(), "has no readable config.json"),
        (lambda export: (export / "diffusion_pytorch_model.safetensors").unlink(), r"has 0 files \*.safetensors"),
        (lambda export: weights_of(export, lambda w: w["proj_out_1.bias"].fill_(1e6)), "bias of .* too large"),
        (lambda export: weights_of(export, lambda w: w["proj_out_1.bias"].fill_(torch.nan)), "or not numbers"),
        (lambda export: weights_of(export, lambda w: w.pop("proj_out_1.bias")), "do not fit .*proj_out_1.bias"),
    ],
)  # fmt: skip
def test_what_is_not_sound_changes_nothing(script, package, transformer, capsys, harm, sentence):
    before = contents(package)
    harm(transformer)
    with pytest.raises(SystemExit) as error:
        script.main([f"dit-transformer={transformer}"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=sentence):
        script.embed({"dit-transformer": str(transformer)})
    assert contents(package) == before


def test_a_package_that_is_too_large_is_refused(script, package, transformer):
    (package / "other.bin").write_bytes(bytes(41_000_000))
    before = contents(package)
    with pytest.raises(ValueError, match=r"would take 4\d\.\d MB, more than 45"):
        script.embed({"dit-transformer": str(transformer)})
    assert contents(package) == before


def test_an_unknown_component(script, transformer):
    with pytest.raises(SystemExit, match="nonsense is no folder"):
        script.main([f"nonsense={transformer}"])
