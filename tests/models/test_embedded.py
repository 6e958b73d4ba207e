import json
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models import VideoPredictor, embedded
from asyncdiff_pl.models.clip import is_random, load_clip
from asyncdiff_pl.models.embedded import EMBEDDED, embedded_folder, find_component, is_trained
from asyncdiff_pl.models.loading import check_pretrained, describe_weights, load_pipeline
from asyncdiff_pl.models.random_weights import build_random_model, component_class
from asyncdiff_pl.models.sources import has_weights

ASSETS = embedded.MODELS_FOLDER


def model_class(component):
    config = json.loads((component / "config.json").read_text())
    if "_class_name" in config:
        return component_class("diffusers", config["_class_name"])
    return component_class("transformers", config["architectures"][0])


def load(name, weights="pretrained"):
    return load_pipeline(DiffusionPipeline, name, weights, torch.float32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def untrained(tmp_path, monkeypatch, cache):
    """The package's models without any weights."""
    folder = tmp_path / "models"
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(embedded, "MODELS_FOLDER", folder)
    return folder


@pytest.fixture(scope="session")
def trained_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "models"
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for component in sorted(path.parent for path in folder.glob("components/*/config.json")):
        model = build_random_model(model_class(component), component, torch.float16, seed_name=component.name)
        model.save_pretrained(component)
    return folder


@pytest.fixture
def trained(trained_models, monkeypatch, cache):
    """The package's models with weights for all networks, not to be changed."""
    monkeypatch.setattr(embedded, "MODELS_FOLDER", trained_models)
    return trained_models


# -- what a user gets -------------------------------------------------------------------------------------------------


def test_tiny_svd_makes_a_video():
    module = VideoPredictor("tiny-svd", num_frames=8, num_inference_steps=1, dtype="float32")
    module.check()
    module.configure_model()
    assert module.size_multiple == 32
    (prediction,) = module.predict_step([Sample("1", image=Image.new("RGB", (128, 128), "red"))])
    assert [frame.size for frame in prediction.frames] == [(128, 128)] * 8


def test_tiny_sd_makes_a_picture():
    pipeline = load("tiny-sd")
    images = pipeline("a small red star", num_inference_steps=2, guidance_scale=5.0).images
    assert [image.size for image in images] == [(128, 128)]


def test_tiny_dit_makes_pictures_with_guidance():
    pipeline = load("tiny-dit")
    classes = pipeline.get_label_ids(["red star", "blue ring"])
    images = pipeline(classes, num_inference_steps=2, guidance_scale=4.0).images
    assert [image.size for image in images] == [(128, 128)] * 2


def test_the_classes_of_tiny_dit_are_those_of_the_scenes():
    scenes = pytest.importorskip("asyncdiff_pl.data.scenes")
    index = json.loads((ASSETS / "tiny-dit" / "model_index.json").read_text())
    assert index["id2label"] == {str(number): name for number, name in enumerate(scenes.CLASS_NAMES)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_package_brings_trained_weights_and_warns_of_nothing(cache, name):
    assert is_trained(name)
    assert describe_weights(name, "pretrained") == "pretrained"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline = load(name)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert all(value.isfinite().all() for network in networks for value in network.state_dict().values())


def test_the_clip_of_the_package_is_trained():
    assert is_trained("tiny-clip")
    assert not is_random("tiny-clip")


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in ASSETS.parent.rglob("*") if path.is_file()) <= 45e6


@pytest.mark.parametrize("name", EMBEDDED)
def test_without_weights_a_pipeline_is_random_and_says_so(untrained, name):
    with pytest.warns(UserWarning, match=f"{name}: random weights, its pictures mean nothing") as caught:
        first = load(name)
    assert len([w for w in caught if "random weights" in str(w.message)]) == 1
    assert describe_weights(name, "pretrained") == "random"
    again = load(name, "random")
    for part, model in first.components.items():
        if isinstance(model, torch.nn.Module):
            values = getattr(again, part).state_dict()
            assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_weights_of_some_networks_alone_are_not_taken(trained, tmp_path, monkeypatch):
    folder = tmp_path / "part"
    shutil.copytree(trained, folder)
    next((folder / "components" / "svd-unet").glob("*.safetensors")).unlink()
    monkeypatch.setattr(embedded, "MODELS_FOLDER", folder)
    assert [is_trained(name) for name in (*EMBEDDED, "tiny-clip")] == [False, True, True, True]
    assert not has_weights(embedded_folder("tiny-svd"))
    check_pretrained(DiffusionPipeline, "tiny-svd", "pretrained")


@pytest.mark.parametrize("name", EMBEDDED)
def test_with_weights_it_is_loaded_as_any_folder(trained, name):
    assert describe_weights(name, "pretrained") == "pretrained"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline = load(name)
    recipe = json.loads((trained / name / "components.json").read_text())
    for part, component in recipe.items():
        if "/" not in component:
            (weights,) = find_component(component).glob("*.safetensors")
            values = getattr(pipeline, part).state_dict()
            for key, value in load_file(weights).items():
                assert torch.equal(values[key], value.float()), key


def test_an_untrained_clip_is_random(untrained):
    assert is_random("tiny-clip")
    model, _ = load_clip("tiny-clip")
    assert model.logit_scale.item() == pytest.approx(2.6592)


# -- towers that models share -----------------------------------------------------------------------------------------


def test_the_towers_are_those_of_the_clip_model(trained):
    clip, processor = load_clip("tiny-clip")
    assert not is_random("tiny-clip")
    svd, sd = load("tiny-svd"), load("tiny-sd")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = processor(text=["a red star", "two large blue rings on a green field"], return_tensors="pt")
    with torch.no_grad():
        images, texts = clip.get_image_features(pixels), clip.text_model(**tokens)
        assert torch.equal(svd.image_encoder(pixels).image_embeds, images.pooler_output)
        tower = sd.text_encoder(**tokens)
    assert torch.equal(tower.last_hidden_state, texts.last_hidden_state)
    # what is pooled is the end of the text, not the token with the largest number or the last of the padding
    ends = [ids.tolist().index(sd.tokenizer.eos_token_id) for ids in tokens["input_ids"]]
    assert ends[0] != ends[1]
    assert torch.equal(tower.pooler_output, tower.last_hidden_state[[0, 1], ends])
    assert sd.text_encoder.config.eos_token_id == sd.tokenizer.eos_token_id == clip.config.text_config.eos_token_id != 2
    assert sd.tokenizer("a red star").input_ids == processor(text="a red star").input_ids


def test_weights_are_stored_once(trained):
    files = [path for path in trained.rglob("*.safetensors") if "svd-xt" not in path.parts]
    assert sorted(path.parent.name for path in files) == sorted(
        path.parent.name for path in (trained / "components").glob("*/config.json")
    )


# -- the cache --------------------------------------------------------------------------------------------------------


def test_several_at_once_get_one_whole_folder(trained, cache):
    start = threading.Barrier(8)

    def ask(_):
        start.wait()
        folder = embedded_folder("tiny-svd")
        return folder, {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert Path("unet/diffusion_pytorch_model.safetensors") in answers[0][1]
    # nothing else is left behind
    assert list(cache.iterdir()) == [answers[0][0]]


def cut_short(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")


def lose_a_file(folder):
    (folder / "vae" / "config.json").unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("harm", [cut_short, lose_a_file, empty])
def test_a_damaged_folder_is_made_anew(trained, cache, harm):
    folder = embedded_folder("tiny-svd")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    harm(folder)
    assert embedded_folder("tiny-svd") == folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(cache.iterdir()) == [folder]


def test_a_folder_that_could_not_be_finished_is_not_used(trained, cache):
    def run_out_of_space(*args, **kwargs):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "save_file", run_out_of_space)
        with pytest.raises(ValueError, match="No space left on device"):
            embedded_folder("tiny-svd")
    assert list(cache.iterdir()) == []
    assert (embedded_folder("tiny-svd") / "image_encoder" / "model.safetensors").exists()


def test_other_weights_are_another_folder(untrained):
    before = embedded_folder("tiny-dit")
    assert embedded_folder("tiny-dit") == before
    config = untrained / "components" / "dit-transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": ', '"num_layers": 1'))
    after = embedded_folder("tiny-dit")
    assert after != before
    assert (after / "transformer" / "config.json").read_text() == config.read_text()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded_folder("tiny-dit").parent == tmp_path / "own" / "models"
    monkeypatch.delenv("ASYNCDIFF_PL_CACHE")
    assert embedded_folder("tiny-dit").parent == tmp_path / "xdg" / "asyncdiff_pl" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_folder("tiny-dit").parent == tmp_path / "home" / ".cache" / "asyncdiff_pl" / "models"


def test_a_cache_that_cannot_be_written_gives_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"put together in a cache folder.*set ASYNCDIFF_PL_CACHE to") as caught:
        check_pretrained(DiffusionPipeline, "tiny-svd", "pretrained")
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


# -- components -------------------------------------------------------------------------------------------------------


def test_components_are_found_by_name_or_folder(tmp_path):
    assert model_class(find_component("svd-unet")).__name__ == "UNetSpatioTemporalConditionModel"
    (tmp_path / "config.json").write_text("{}")
    assert find_component(str(tmp_path)) == tmp_path
    for unknown in ("svd-nut", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=f"{unknown} is no folder with a config.json; .* svd-unet"):
            find_component(unknown)
