"""Pipelines of each kind, with small checkpoints: what they make. What is known before: test_pipeline_checks.py."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models import IPAdapter, Lora, PipelinePredictor


@pytest.fixture(scope="module")
def predictor(place):
    loaded = {}

    def build(name="sd", **settings):
        settings = {"num_inference_steps": 2, "dtype": "float32", **settings}
        if "components" in settings:
            parts = settings["components"].items()
            found = {k: [place(x) for x in v] if isinstance(v, list) else v and place(v) for k, v in parts}
            settings["components"] = found
        key = (name, repr(settings))
        if key not in loaded:
            module = PipelinePredictor(place(name), **settings)
            module.check()
            module.configure_model()
            loaded[key] = module
        return loaded[key]

    return build


def picture(seed, width=64, height=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width=64, height=64):
    """White where the picture is to be redrawn: on the left."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def pixels(prediction):
    return np.stack([np.asarray(frame.convert("RGB")) for frame in prediction.frames]).astype(int)


def difference(first, second):
    return np.abs(pixels(first) - pixels(second)).mean()


def one(module, sample):
    (prediction,) = module.predict_step([sample])
    return prediction


RED, BLUE = Sample("a", ("a red cube on grass",)), Sample("b", ("two dogs at night",), prompt="a blue ball")


def with_image(sample, seed, width=64, height=64, **inputs):
    return dataclasses.replace(sample, image=picture(seed, width, height), inputs=inputs)


PICTURES = [with_image(RED, 1, width=80), with_image(BLUE, 2, width=80)]
MASKED = [with_image(s, k, mask_image=half_mask()) for k, s in enumerate((RED, BLUE))]
CONTROLLED = [with_image(s, k, control_image=picture(k + 5)) for k, s in enumerate((RED, BLUE))]
SMALL = [with_image(s, k, width=24, height=16) for k, s in enumerate((RED, BLUE))]
CLASSES = [Sample("a", inputs={"class_label": 2}), Sample("b", inputs={"class_label": "tench"})]
PROMPTS = [RED, BLUE]

KINDS = {
    "sd": ("sd", {"height": 64, "width": 80}, PROMPTS, (80, 64)),
    "sdxl": ("sdxl", {}, PROMPTS, (64, 64)),
    "sd3": ("sd3", {"height": 64, "width": 96}, PROMPTS, (96, 64)),
    "sd3 without T5": ("sd3", {"components": {"text_encoder_3": None}}, PROMPTS, (64, 64)),
    "flux": ("flux", {"height": 64, "width": 96}, PROMPTS, (96, 64)),
    "flux, true guidance": (
        "flux",
        {"height": 64, "width": 64, "negative_prompt": "bad", "call": {"true_cfg_scale": 4.0}},
        PROMPTS,
        (64, 64),
    ),
    "image to image": (
        "sd",
        {"pipeline": "StableDiffusionImg2ImgPipeline", "strength": 0.6, "num_inference_steps": 4},
        PICTURES,
        (80, 64),
    ),
    "inpainting, 9 channels": ("inpainting", {}, MASKED, (64, 64)),
    "inpainting, 4 channels": (
        "sd",
        {"pipeline": "StableDiffusionInpaintPipeline", "strength": 0.75, "num_inference_steps": 4},
        MASKED,
        (64, 64),
    ),
    "upscaling": ("upscaler", {}, SMALL, (96, 64)),
    "controlnet": (
        "sd",
        {"pipeline": "StableDiffusionControlNetPipeline", "components": {"controlnet": "controlnet"}},
        PICTURES,
        (80, 64),
    ),
    "two controlnets": (
        "sd",
        {
            "pipeline": "StableDiffusionControlNetPipeline",
            "components": {"controlnet": ["controlnet", "controlnet2"]},
            "call": {"image": ["{control_image}", "{image}"]},
        },
        CONTROLLED,
        (64, 64),
    ),
    "controlnet, image to image": (
        "sd",
        {"pipeline": "StableDiffusionControlNetImg2ImgPipeline", "components": {"controlnet": "controlnet"}},
        CONTROLLED,
        (64, 64),
    ),
    "animatediff": (
        "sd",
        {"pipeline": "AnimateDiffPipeline", "components": {"motion_adapter": "motion"}, "num_frames": 3},
        PROMPTS,
        (64, 64),
    ),
    "dit": ("dit", {}, CLASSES, (64, 64)),
    "dit, stochastic scheduler": ("dit", {"scheduler": "ddpm"}, CLASSES, (64, 64)),
    "stochastic scheduler": ("sd", {"scheduler": "euler_ancestral_discrete"}, PROMPTS, (64, 64)),
    "few steps": ("sd", {"scheduler": "lcm", "guidance_scale": 1.0}, PROMPTS, (64, 64)),
    "tiles and slices": ("sd", {"vae_tiling": True, "vae_slicing": True}, PROMPTS, (64, 64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_pipeline_gives_the_same_pictures_alone_and_in_a_batch(predictor, kind):
    name, settings, samples, size = KINDS[kind]
    module = predictor(name, **settings)
    together = module.predict_step(samples)
    assert [p.sample for p in together] == samples
    for sample, prediction in zip(samples, together, strict=True):
        assert len(prediction.frames) == module.frames_per_sample == settings.get("num_frames", 1)
        assert {frame.size for frame in prediction.frames} == {size}
        assert pixels(prediction).std() > 10
        assert np.abs(pixels(one(module, sample)) - pixels(prediction)).max() <= 1
    assert difference(*together) > 5


def test_a_picture_is_the_pipelines_own(predictor):
    module = predictor()
    sample = Sample("a", ("a red cube",), seed=7)
    expected = module.pipeline("a red cube", num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[
        0
    ]
    assert np.array_equal(np.asarray(expected), np.asarray(one(module, sample).frames[0]))


def test_samples_of_one_batch_may_have_settings_of_their_own(predictor):
    module = predictor()
    plain = Sample("same", ("a red cube",), seed=3)
    variants = [
        plain,
        dataclasses.replace(plain, id="weak", inputs={"guidance_scale": 2.0}),
        dataclasses.replace(plain, id="other"),
        dataclasses.replace(plain, id="without grass", inputs={"negative_prompt": "grass, green"}),
        dataclasses.replace(plain, id="seed", seed=4),
    ]
    predictions = module.predict_step(variants)
    assert [p.sample.id for p in predictions] == ["same", "weak", "other", "without grass", "seed"]
    first, weak, same, negative, reseeded = predictions
    assert np.abs(pixels(first) - pixels(same)).max() <= 1
    for changed in (weak, negative, reseeded):
        assert difference(first, changed) > 1


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {"guidance_scale": 2.0}),
        ({}, {"negative_prompt": "grass, green"}),
        ({}, {"call": {"prompt": "{prompt}, oil on canvas"}}),
        ({}, {"components": {"vae": "vae"}}),
        ({}, {"scheduler": "euler_ancestral_discrete"}),
        ({"pipeline": "StableDiffusionImg2ImgPipeline", "strength": 0.5}, {"strength": 1.0}),
        (
            {"pipeline": "StableDiffusionControlNetPipeline", "components": {"controlnet": "controlnet"}},
            {"call": {"controlnet_conditioning_scale": 0.0}},
        ),
    ],
)
def test_a_setting_takes_effect(predictor, settings, more):
    sample = PICTURES[0]
    assert difference(one(predictor(**settings), sample), one(predictor(**{**settings, **more}), sample)) > 1


def test_only_what_the_mask_shows_is_redrawn(predictor):
    name, settings, samples, _ = KINDS["inpainting, 4 channels"]
    module = predictor(name, **settings)
    left, right = (
        dataclasses.replace(samples[0], inputs={"mask_image": mask})
        for mask in (half_mask(), half_mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    )
    drawn = [pixels(one(module, sample))[0] for sample in (left, right)]
    # what a random autoencoder makes of the picture itself
    kept = pixels(one(module, dataclasses.replace(left, inputs={"mask_image": Image.new("L", (64, 64))})))[0]
    changes = [np.abs(result - kept) for result in drawn]
    # the random autoencoder lets some of it through to the other side
    assert changes[0][:, :24].mean() > 1.3 * changes[0][:, 40:].mean()
    assert changes[1][:, 40:].mean() > 1.3 * changes[1][:, :24].mean()


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_a_lora_changes_the_picture_by_its_weight(predictor, place):
    pytest.importorskip("peft")
    plain = one(predictor(), RED)
    changes = [difference(plain, one(predictor(lora=[Lora(place("lora"), w)]), RED)) for w in (0.0, 0.5, 1.0)]
    assert changes[0] < 1e-3
    assert 1 < changes[1] < changes[2]
    # nothing of it is left in the network's structure: a stage is cut as without
    names = dict(predictor().denoiser.named_modules()).keys()
    assert dict(predictor(lora=[Lora(place("lora"), 1.0)]).denoiser.named_modules()).keys() == names
    # two add up
    two = one(predictor(lora=[Lora(place("lora"), 0.5)] * 2), RED)
    assert difference(two, one(predictor(lora=[Lora(place("lora"), 1.0)]), RED)) < 1


def test_an_ip_adapter_changes_the_picture(predictor, place):
    adapter = IPAdapter(place("ip_adapter"), "models", "ip-adapter.safetensors")
    module = predictor(ip_adapter=adapter)
    samples = [dataclasses.replace(RED, inputs={"ip_adapter_image": picture(seed)}) for seed in (1, 2)]
    first, second = module.predict_step(samples)
    assert difference(first, second) > 1
    assert difference(first, one(predictor(ip_adapter=dataclasses.replace(adapter, scale=0.0)), samples[0])) > 1
    with pytest.raises(ValueError, match="Sample a has no ip_adapter_image, which StableDiffusionPipeline takes"):
        module.predict_step([RED])


# -- its call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "dit", "upscaler", "animatediff"])
def test_the_example_call_is_the_pipelines_call(predictor, place, name):
    kind, settings, *_ = KINDS["animatediff"] if name == "animatediff" else (name, {})
    size = {} if name in ("dit", "upscaler") else {"height": 64, "width": 64}
    module = predictor(kind, **settings, **size)
    calls = []
    hook = module.denoiser.register_forward_pre_hook(
        lambda unet, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    module.predict_step([{"dit": CLASSES[0], "upscaler": with_image(RED, 1, 16, 16)}.get(name, RED)])
    hook.remove()
    twin, args, kwargs = module.example_call(64, 64)

    def shapes(value):
        return tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x, value)

    if name in ("sd", "sdxl", "upscaler", "animatediff"):
        # timesteps are of the scheduler's own format
        calls[0] = ((calls[0][0][0],), calls[0][1])
        args = args[:1]
    else:
        args, kwargs = tree_map(lambda x: x, (args, kwargs))
        calls[0][1].pop("timestep"), kwargs.pop("timestep")
    assert shapes((args, kwargs)) == shapes(calls[0])
    assert shapes(dict(twin.state_dict())) == shapes(dict(module.denoiser.state_dict()))
    assert {p.device.type for p in twin.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("kind", "sample", "message"),
    [
        ("image to image", RED, "Sample a has no image, which StableDiffusionImg2ImgPipeline takes as `image`"),
        ("inpainting, 9 channels", PICTURES[0], "Sample a has no mask_image"),
        ("dit", RED, "Sample a has no class_label"),
        (
            "dit",
            Sample("a", inputs={"class_label": "unicorn"}),
            "knows no class unicorn; give one of its 4 names, ",
        ),
        ("dit", Sample("a", inputs={"class_label": 1000}), "has no class 1000; give a number from 0 to 999"),
        ("sdxl", Sample("a", inputs={"stength": 0.5}), "Sample a has stength, but StableDiffusionXLPipeline takes no"),
        ("two controlnets", PICTURES[0], "Sample a has no control_image, which `call` names"),
        # what diffusers itself finds
        (
            "sdxl",
            Sample("a", inputs={"prompt": "a boat", "height": 100}),
            "^StableDiffusionXLPipeline refuses its call: .* divisible by 8 .*with height, prompt; model.call takes",
        ),
    ],
)
def test_samples_that_do_not_fit(predictor, kind, sample, message):
    name, settings, _, _ = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        predictor(name, **settings).predict_step([sample])


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_random_weights_take_parts_from_elsewhere_and_no_safety_checker(place, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(place("sd"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    for weights in ("random", "pretrained"):
        module = PipelinePredictor(
            str(folder),
            pipeline="StableDiffusionControlNetPipeline",
            components={"controlnet": [place("controlnet"), place("controlnet")]},
            num_inference_steps=2,
            dtype="float32",
            weights=weights,
        )
        module.check()
        module.configure_model()
        assert pixels(one(module, PICTURES[0])).std() > 10
        assert module.weights_description == weights


@pytest.mark.parametrize(("name", "sample"), [("tiny-sd", RED), ("tiny-dit", CLASSES[0])])
def test_the_packages_own_models_run(name, sample):
    module = PipelinePredictor(name, num_inference_steps=1, dtype="float32", weights="random")
    module.check()
    module.configure_model()
    assert pixels(one(module, sample)).shape == (1, *module.picture_size(None, None), 3)
