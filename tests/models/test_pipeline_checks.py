"""What is known of a pipeline before anything of it is loaded: guidance, sizes, and settings that are wrong."""

import json
import shutil

import pytest

from asyncdiff_pl.models import DiffusionPredictor, IPAdapter, Lora, PipelinePredictor, example_calls

CONTROLNET = "StableDiffusionControlNetPipeline"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sd", {}, True),
        ("sd", {"guidance_scale": 1.0}, False),
        ("sd3", {}, True),
        ("flux", {}, False),
        ("dit", {}, True),
        ("dit", {"call": {"guidance_scale": 1.0}}, False),
    ],
)
def test_guidance_is_known_early(place, name, settings, expected):
    assert PipelinePredictor(place(name), **settings).is_guided is expected


def test_of_a_hub_name_little_is_known_early():
    module = PipelinePredictor("owner/name")
    module.check()
    assert module.is_guided is module.size_multiple is module.example_call(64, 64) is None
    assert module.frames_per_sample == 1
    module = PipelinePredictor("owner/name", pipeline="AnimateDiffPipeline", components={"motion_adapter": "a/b"})
    module.check()
    assert module.is_guided
    assert module.frames_per_sample == 16


@pytest.mark.parametrize(
    ("name", "settings", "data", "expected"),
    [
        ("sd", {}, (512, 1024), (64, 64)),
        ("sd", {"height": 128, "width": 64}, (512, 1024), (128, 64)),
        ("sd", {"pipeline": "StableDiffusionImg2ImgPipeline"}, (512, 1024), (512, 1024)),
        ("upscaler", {}, (16, 24), (64, 96)),
        ("flux", {}, (None, None), (1024, 1024)),
    ],
)
def test_the_size_of_the_results_is_known_early(place, name, settings, data, expected):
    assert PipelinePredictor(place(name), **settings).picture_size(*data) == expected


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "sd",
            {"call": {"gudance_rescale": 1}},
            r"takes no gudance_rescale \(but guidance_rescale\): it takes prompt",
        ),
        ("sd", {"strength": 0.5}, "StableDiffusionPipeline takes no strength: it takes prompt, height"),
        ("sd", {"num_frames": 8}, "^num_frames is set, but StableDiffusionPipeline takes no num_frames"),
        ("dit", {"negative_prompt": "bad"}, "DiTPipeline takes no negative_prompt: it takes class_labels, guidance"),
        ("sd", {"call": {"generator": 1}}, "the module itself gives generator"),
        ("sd", {"call": {"num_images_per_prompt": 2}}, "leave it out and set images_per_prompt of the data"),
        ("sd", {"height": 100}, "height is 100 pixels; .* takes multiples of 8"),
        ("sd3", {"width": 72}, "width is 72 pixels; .* takes multiples of 16"),
        ("sd", {"pipeline": CONTROLNET}, "lacks controlnet to be a StableDiffusionControlNetPipeline; .* `components`"),
        (
            "sd",
            {"components": {"controlnet": "a/b"}},
            "StableDiffusionPipeline has no controlnet: it has vae, ",
        ),
        ("sd", {"components": {"vae": "./nowhere"}}, "components.vae is ./nowhere, which is no folder"),
        ("sd", {"components": {"unet": "a/b"}}, "components names the denoiser itself"),
        ("sd", {"lora": [Lora("./nowhere")]}, "lora names ./nowhere, which is not there"),
        ("sd", {"lora": [Lora("owner/name")]}, "The LoRA owner/name is on the hub; name its file as `weight_name`"),
        ("dit", {"ip_adapter": IPAdapter("a/b", "c", "d")}, "DiTPipeline takes no ip_adapter"),
        ("sd", {"pipeline": "StableCascadePriorPipeline"}, "lacks .* to be a StableCascadePriorPipeline"),
        ("sd", {"scheduler": "eulr"}, "There is no scheduler eulr"),
    ],
)
def test_bad_settings_are_told_before_anything_is_loaded(place, name, settings, message):
    if "lora" in settings:
        pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message) as caught:
        PipelinePredictor(place(name), **settings).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pipeline": "StableDifusionPipeline"},
            "There is no pipeline StableDifusionPipeline; take StableDiffusion",
        ),
        ({"pipeline": "UNet2DModel"}, "There is no pipeline UNet2DModel"),
        ({"pretrained": "./nowhere"}, "There is no folder ./nowhere"),
        ({"offload": "model"}, "offload is model, which would move the networks"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"fps": 0}, "fps is 0"),
        ({"guidance_scale": 2.0, "call": {"guidance_scale": 3.0}}, "guidance_scale is set twice"),
    ],
)
def test_bad_settings_of_any_checkpoint(settings, message):
    with pytest.raises(ValueError, match=message):
        PipelinePredictor(**{"pretrained": "owner/name", **settings}).check()


def test_single_files_and_quantised_weights(place, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a single file; make a folder of it once, .*from_single_file"):
        PipelinePredictor(str(file)).check()
    folder = tmp_path / "quantised"
    shutil.copytree(place("sd"), folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"The unet of .* is quantised \(bitsandbytes\), which cannot be cut"):
        PipelinePredictor(str(folder)).check()


def test_values_of_the_data_are_held_against_the_pipeline_early(place):
    module = PipelinePredictor(place("sd"), call={"prompt": "{style} {prompt}"})
    module.check_inputs({"guidance_scale", "negative_prompt", "style"})
    with pytest.raises(ValueError, match="The data has mask_image, but StableDiffusionPipeline takes no mask_image"):
        module.check_inputs({"mask_image"})


def test_why_a_denoiser_is_not_foreseen(place, monkeypatch):
    monkeypatch.delitem(example_calls.CALLS, "SD3Transformer2DModel")
    module = PipelinePredictor(place("sd3"))
    assert module.example_call(64, 64) is None
    assert module.why_unforeseen.startswith("How a pipeline calls its SD3Transformer2DModel is not known here")
    assert "give a local folder" in PipelinePredictor("owner/name").why_unforeseen
    assert DiffusionPredictor("owner/name").why_unforeseen.startswith("DiffusionPredictor does not say how its")
