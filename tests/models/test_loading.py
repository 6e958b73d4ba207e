import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as VideoUNet
from huggingface_hub.errors import HTTPError

from asyncdiff_pl.models.embedded import MODELS_FOLDER, find_component
from asyncdiff_pl.models.loading import check_pretrained, describe_weights, load_pipeline, prepare_download
from asyncdiff_pl.models.sources import ARCHITECTURES, read_component_config

SVD_XT = "stabilityai/stable-video-diffusion-img2vid-xt"


def load(
    pretrained, weights="pretrained", dtype=torch.float32, variant=None, pipeline_class=StableVideoDiffusionPipeline
):
    return load_pipeline(pipeline_class, str(pretrained), weights, dtype, variant)


def parameters(pipeline):
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in models.items() for key, value in part.state_dict().items()}


def assert_same(first, second):
    first, second = parameters(first), parameters(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def saved(small_svd):
    return Path(small_svd)


@pytest.fixture(scope="module")
def tiny(saved):
    return load(saved, "random")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_random_weights_are_the_same_each_time_and_leave_the_global_state_alone(saved, tiny):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = load(saved, "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert_same(tiny, again)


def test_random_weights_differ_between_parameters(tiny):
    blocks = [p for n, p in tiny.unet.named_parameters() if n.endswith("conv2.weight") and p.shape == (64, 64, 3, 3)]
    assert len(blocks) > 5
    assert len({p.flatten()[0].item() for p in blocks}) == len(blocks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_weights_in_half_precision_are_the_rounded_ones(saved, tiny, dtype):
    half = parameters(load(saved, "random", dtype))
    for name, value in parameters(tiny).items():
        assert torch.equal(half[name], value.to(half[name].dtype)), name
        assert half[name].dtype == (dtype if value.is_floating_point() else value.dtype)


def test_buffers_are_what_the_constructor_makes(tiny):
    ids = tiny.image_encoder.vision_model.embeddings.position_ids
    assert torch.equal(ids, torch.arange(ids.shape[1])[None])
    assert tiny.scheduler.alphas_cumprod.dtype == torch.float32


def test_the_tiny_denoiser_reacts_to_its_inputs(tiny):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def run(latents, image, embedding):
        times = torch.tensor([[6.0, 127.0, 0.02]])
        with torch.no_grad():
            return tiny.unet(torch.cat([latents, image], 2), torch.tensor(1.0), embedding, times).sample

    inputs = [draw(1, 3, 4, 8, 8), draw(1, 3, 4, 8, 8), draw(1, 1, 32)]
    usual = run(*inputs)
    assert 0.2 < usual.std() < 5
    for i, value in enumerate(inputs):
        changed = run(*inputs[:i], draw(*value.shape), *inputs[i + 1 :])
        assert (changed - usual).norm() > 0.3 * usual.norm()


def test_a_saved_pipeline_comes_back(tiny, saved):
    assert_same(tiny, load(saved))


def test_random_weights_of_a_folder_need_its_json_files_only(saved, tiny, tmp_path):
    folder = tmp_path / "config"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_same(tiny, load(folder, "random"))
    with pytest.raises(ValueError, match=r"has no weight files .* `weights: random`"):
        load(folder)


def test_the_general_pipeline_class_lets_the_folder_say(saved):
    assert isinstance(load(saved, "random", pipeline_class=DiffusionPipeline), StableVideoDiffusionPipeline)


def test_variants(tiny, saved, tmp_path):
    with pytest.raises(ValueError, match="has no weight files of variant fp16; set `variant: null`"):
        load(saved, variant="fp16")
    tiny.save_pretrained(tmp_path, variant="fp16")
    assert_same(tiny, load(tmp_path, variant="fp16"))
    with pytest.raises(ValueError, match="could not be loaded with variant None"):
        load(tmp_path)


def test_a_folder_that_lacks_one_models_weights(saved, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(saved, folder, ignore=lambda where, names: [n for n in names if n == "model.safetensors"])
    with pytest.raises(ValueError, match="could not be loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("pretrained", "weights", "described"),
    [
        ("tiny-svd", "random", "random"),
        ("./folder", "pretrained", "pretrained"),
        (SVD_XT, "pretrained", "pretrained"),
        (SVD_XT, "random", "random"),
    ],
)
def test_describe_weights(pretrained, weights, described):
    assert describe_weights(pretrained, weights) == described


def test_loading_random_weights_is_quiet(saved, capfd):
    load(saved, "random")
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


def test_the_packaged_architecture_is_svd_xt():
    folder = MODELS_FOLDER / ARCHITECTURES[SVD_XT][0]
    with torch.device("meta"):
        unet = VideoUNet.from_config(VideoUNet.load_config(folder / "unet"))
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082
    tiny_unet = VideoUNet.load_config(find_component("svd-unet"))
    assert tiny_unet["down_block_types"] == list(unet.config.down_block_types)
    assert tiny_unet["up_block_types"] == list(unet.config.up_block_types)


@pytest.mark.parametrize(
    ("pretrained", "num_frames", "levels"),
    [
        (SVD_XT, 25, [320, 640, 1280, 1280]),
        (SVD_XT.removesuffix("-xt"), 14, [320, 640, 1280, 1280]),
        ("tiny-svd", 8, [32, 64, 96, 96]),
        ("a folder", 8, [32, 64, 64, 64]),
    ],
)
def test_configurations_are_known_without_download(offline, saved, pretrained, num_frames, levels):
    config = read_component_config(str(saved) if pretrained == "a folder" else pretrained, "unet")
    assert config["num_frames"] == num_frames
    assert config["block_out_channels"] == levels
    assert read_component_config("owner/name", "unet") is None


def test_hub_names_without_download_need_a_known_architecture(offline):
    check_pretrained(StableVideoDiffusionPipeline, SVD_XT, "random")
    prepare_download(StableVideoDiffusionPipeline, SVD_XT, "random")
    with pytest.raises(ValueError, match=r"knows the architectures of .* not that of owner/name"):
        check_pretrained(StableVideoDiffusionPipeline, "owner/name", "random")


@pytest.mark.parametrize(
    ("pretrained", "remedy"),
    [("owner/name", "folder as `pretrained`."), (SVD_XT, "folder as `pretrained`, or set `weights: random`.")],
)
@pytest.mark.parametrize("failure", ["offline", "timeout"])
def test_a_hub_that_cannot_be_reached(offline, monkeypatch, pretrained, remedy, failure):
    if failure == "timeout":

        def time_out(*args, **kwargs):
            raise HTTPError("timed out")

        monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", time_out)
    for fetch in (
        lambda: prepare_download(StableVideoDiffusionPipeline, pretrained, "pretrained"),
        lambda: load(pretrained),
    ):
        with pytest.raises(ValueError, match=f"{pretrained} is not in the cache and could not be fetched") as caught:
            fetch()
        assert str(caught.value).endswith(remedy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("pretrained", ["./missing", "/missing/model", "~/missing", "a/b/c", "tiny_svd"])
def test_a_missing_folder(pretrained, weights):
    with pytest.raises(ValueError, match=f"There is no folder {pretrained}; give an existing one"):
        check_pretrained(StableVideoDiffusionPipeline, pretrained, weights)


def test_folders_that_are_no_such_pipeline(tmp_path, saved):
    with pytest.raises(ValueError, match=r"is not a diffusers pipeline's folder: it has no readable model_index\.json"):
        check_pretrained(StableVideoDiffusionPipeline, str(tmp_path), "random")
    message = "holds a StableVideoDiffusionPipeline, which lacks .*text_encoder.* to be a StableDiffusionPipeline"
    with pytest.raises(ValueError, match=message):
        check_pretrained(StableDiffusionPipeline, str(saved), "random")
    with pytest.raises(ValueError, match="is a file"):
        check_pretrained(StableVideoDiffusionPipeline, str(saved / "model_index.json"), "random")


def test_folders_and_embedded_models_need_no_download(saved, offline):
    for pretrained in (str(saved), "tiny-svd"):
        prepare_download(StableVideoDiffusionPipeline, pretrained, "pretrained")
