"""Each module trains its network, in the conditions of its pipeline, and exports what the pipeline loads."""

import functools
import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from asyncdiff_pl.data.scene_clips import SceneClips
from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.training import (
    AutoencoderTraining,
    ClassDenoiserTraining,
    CLIPTraining,
    ImageDenoiserTraining,
    VideoDenoiserTraining,
)
from asyncdiff_pl.models.training.base import drawn_from, to_pil
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.training.motion import motion_bucket

CPU = torch.device("cpu")

CASES = {
    "image autoencoder": (lambda: AutoencoderTraining("scene-image-autoencoder"), AutoencoderKL, 1),
    "video autoencoder": (lambda: AutoencoderTraining("scene-video-autoencoder"), AutoencoderKLTemporalDecoder, 3),
    "clip": (CLIPTraining, CLIPModel, 1),
    "video denoiser": (VideoDenoiserTraining, UNetSpatioTemporalConditionModel, 3),
    "image denoiser": (ImageDenoiserTraining, UNet2DConditionModel, 1),
    "class denoiser": (ClassDenoiserTraining, DiTTransformer2DModel, 1),
}


class Asked:
    """What a data module asks of its trainer."""

    global_step = global_rank = 0
    accumulate_grad_batches = world_size = 1
    training = True


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def clips(num_frames, size=32, number=4, **settings):
    data = SceneClips(batch_size=number, num_frames=num_frames, size=size, num_workers=0, **settings)
    data.trainer = Asked()
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


def build(make, seed=0):
    torch.manual_seed(seed)
    module = make()
    module.frozen = {name: part.eval().requires_grad_(False) for name, part in module.load_frozen().items()}
    return module


@pytest.mark.parametrize(("make", "model_class", "num_frames"), CASES.values(), ids=CASES.keys())
def test_a_fixed_batch_is_learned_and_exported(make, model_class, num_frames, tmp_path):
    module, batch = build(make), clips(num_frames, changed_captions=2)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        with drawn_from(1, CPU):
            loss = module.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        # DDP waits for the gradient of every parameter
        assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(not name.startswith("frozen") for name in module.state_dict())

    module.export(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert {weight.dtype for weight in load_file(file).values()} == {torch.float16}
    trained, loaded = module.network.state_dict(), model_class.from_pretrained(tmp_path).state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name].half(), loaded[name].half()) for name in trained)


def test_latents_get_unit_variance(tmp_path):
    module, batch = build(CASES["image autoencoder"][0]), clips(1)
    module.loss(batch)
    module.export(tmp_path)
    autoencoder = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float32)
    latents = autoencoder.encode(batch["frames"][:, 0] * 2 - 1).latent_dist.mode().detach()
    assert latents.std() * autoencoder.config.scaling_factor == pytest.approx(1, abs=0.01)


def test_a_video_autoencoder_starts_from_one_of_pictures(tmp_path):
    pictures, start, exported = build(CASES["image autoencoder"][0]), tmp_path / "pictures", tmp_path / "videos"
    batch = clips(4)
    # it is added before padding there and after it here
    torch.nn.init.zeros_(pictures.network.post_quant_conv.bias)
    pictures.loss(batch)
    pictures.export(start)
    own = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32)
    # the one of videos has a middle block of one layer
    own.decoder.mid_block.resnets, own.decoder.mid_block.attentions = (
        own.decoder.mid_block.resnets[:1],
        torch.nn.ModuleList(),
    )
    expected = own.decode(own.encode(batch["frames"].flatten(0, 1) * 2 - 1).latent_dist.mode()).sample

    module = build(lambda: AutoencoderTraining("scene-video-autoencoder", start_from=str(start), freeze_encoder=True))
    module.network.eval()
    decoded = module.round_trip(batch["frames"], draw=False)[0].flatten(0, 1)
    # the weights are stored in 16 bits
    assert (decoded - expected).norm() < 0.01 * expected.norm()
    encoder = {name for name, p in module.network.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in encoder} == {"encoder", "quant_conv", "decoder"}
    module.export(exported)
    assert read_config(exported)["scaling_factor"] == read_config(start)["scaling_factor"] != 0.18215


def test_a_start_without_weights(tmp_path):
    config = find_component("scene-image-autoencoder") / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    with pytest.raises(ValueError, match="but there are no weights: it has neither diffusion_pytorch_model"):
        AutoencoderTraining("scene-image-autoencoder", start_from=str(tmp_path))


def test_clip_is_exported_with_its_processor(tmp_path):
    module = build(CLIPTraining)
    module.export(tmp_path)
    processor = CLIPProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.eos_token_id == 1023
    batch = clips(1)
    inputs = processor(
        text=batch["captions"], images=[to_pil(x[0]) for x in batch["frames"]], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        scores = module.network.eval()(**inputs).logits_per_image / module.network.logit_scale.exp()
        found = module.embed_pictures(batch["frames"][:, 0]) @ module.embed_tokens(module._tokens(batch)[0]).T
    assert (found - scores).abs().max() < 0.01


class Seen(Exception):
    """A network was called."""


def seen_by(network, call):
    """Arguments of the first call of a network."""
    found = {}

    def look(module, args, kwargs):
        found.update(kwargs, inputs=args[0] if args else kwargs["sample"])
        raise Seen

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen):
        call()
    handle.remove()
    return found


def seen_by_pipeline(module, batch):
    """What the video pipeline gives the network for each clip of a batch, told of its true motion and frame rate."""
    run = {"height": 64, "width": 64, "num_frames": 3, "num_inference_steps": 1, "noise_aug_strength": 1e-7}
    for clip, fps, bucket in zip(batch["frames"], batch["fps"], motion_bucket(batch["frames"]), strict=True):
        own = {"image": to_pil(clip[0]), "fps": int(fps), "motion_bucket_id": bucket.item(), **run}
        yield seen_by(module.network, functools.partial(module.pipeline(), **own))


def test_the_video_network_is_trained_in_the_conditions_of_its_pipeline():
    # so little noise on the picture that it does not show
    module = build(lambda: VideoDenoiserTraining(min_noise_aug=1e-7, max_noise_aug=1e-7))
    batch = clips(num_frames=3, size=64, number=2)
    # pictures of 8 bits, as the pipeline gets them
    batch["frames"] = (batch["frames"] * 255).round() / 255
    both = torch.ones(2)
    trained = seen_by(module.network, lambda: module._losses(batch, both, both))
    for number, used in enumerate(seen_by_pipeline(module, batch)):
        # the pipeline's batch: without the picture, with it
        without, given = used["encoder_hidden_states"]
        assert not without.any()
        assert (trained["encoder_hidden_states"][number] - given).abs().max() < 1e-3 * given.abs().max()
        torch.testing.assert_close(trained["added_time_ids"][number], used["added_time_ids"][1])
        without, given = used["inputs"][:, :, 4:]
        assert not without.any()
        assert (trained["inputs"][number, :, 4:] - given).abs().max() < 1e-3 * given.abs().max()
    dropped = seen_by(module.network, lambda: module._losses(batch, both, 0 * both))
    assert not dropped["encoder_hidden_states"].any()
    assert not dropped["inputs"][:, :, 4:].any()
    assert dropped["inputs"][:, :, :4].all()
    vae = module.frozen["vae"]
    latents = vae.encode(batch["frames"][:, 0] * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(module.clip_latents(batch["frames"])[:, 0], latents * vae.config.scaling_factor)


@pytest.mark.parametrize(
    ("kind", "encoded"),
    [
        # the picture that the video network is given has noise of its own in each step
        ("video denoiser", [[12, 4], [4], [12, 4]]),
        ("image denoiser", [[4], [], [4]]),
        ("class denoiser", [[4], [], [4]]),
    ],
)
def test_clips_are_encoded_once_for_steps_that_share_them(kind, encoded):
    make, _, num_frames = CASES[kind]
    module, batch, again = build(make), clips(num_frames), clips(num_frames)
    seen, losses = [], []
    module.frozen["vae"].encoder.register_forward_pre_hook(lambda _, inputs: seen[-1].append(len(inputs[0])))
    for used in (batch, {**batch}, again):
        seen.append([])
        with drawn_from(1, CPU):
            losses.append(module.loss(used)["loss"].item())
    assert seen == encoded
    assert losses[0] == losses[1] == losses[2]


def test_the_image_network_is_trained_in_the_conditions_of_its_pipeline():
    module, batch = build(ImageDenoiserTraining), clips(1, size=64, number=2)
    used = seen_by(module.network, lambda: module.sample(batch, torch.Generator()))
    for dropped, given in zip((True, False), used["encoder_hidden_states"].chunk(2), strict=True):
        torch.testing.assert_close(module.condition(batch, torch.tensor([dropped, dropped])), given)


def test_blocks_of_a_new_transformer_change_nothing():
    network = build(ClassDenoiserTraining).network
    seen = {}
    for number, block in enumerate(network.transformer_blocks):
        block.register_forward_hook(lambda module, args, output, at=number: seen.update({at: (args[0], output)}))
    estimate = network(torch.randn(2, 4, 32, 32), torch.tensor([3, 500]), torch.tensor([0, 79])).sample
    assert all(torch.equal(before, after) for before, after in seen.values())
    assert len(seen) == 8 and not estimate.any()


def test_classes_are_dropped_in_all_blocks_at_once():
    module, batch = build(ClassDenoiserTraining), clips(1, number=2)
    used = seen_by(module.network, lambda: module.sample(batch, torch.Generator()))
    assert used["class_labels"].tolist() == [*batch["label"].tolist(), 1000, 1000]
    assert module.condition(batch, torch.tensor([True, False])).tolist() == [1000, batch["label"][1]]
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    module.network.train()
    assert torch.equal(*(module.predict(noisy, times, batch["label"]) for _ in range(2)))


@pytest.mark.parametrize("make", [VideoDenoiserTraining, ImageDenoiserTraining, ClassDenoiserTraining])
def test_pictures_of_a_validation_batch_stand_beside_the_true_ones(make):
    module, batch = build(lambda: make(num_samples=1, sample_steps=2)), clips(2, size=128, number=2)
    found = module.pictures(batch)
    columns = 2 if make is VideoDenoiserTraining else 1
    assert found.shape == (2, columns, 3, 128, 128)
    assert torch.equal(found[0], batch["frames"][0, :columns])


class Accumulating(Asked):
    accumulate_grad_batches = 2


def test_a_capture_that_cannot_be_is_told():
    module = ClassDenoiserTraining(capture=True)
    module._trainer = Asked()
    with pytest.warns(UserWarning, match="model.capture does nothing on cpu: CUDA graphs need a GPU of NVIDIA"):
        module.on_fit_start()
    module._trainer = Accumulating()
    with pytest.raises(ValueError, match=r"takes gradients of one batch, and trainer\.accumulate_grad_batches is 2"):
        module.on_fit_start()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("make", [VideoDenoiserTraining, ImageDenoiserTraining, ClassDenoiserTraining])
def test_captured_steps_are_the_steps_without_capture(make):
    losses = {}
    for capture in (False, True):
        module, batch = build(functools.partial(make, capture=capture)).cuda(), clips(2, number=2)
        module._trainer, batch = Asked(), {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        module.on_fit_start()
        optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-3)
        for _ in range(4):
            with drawn_from(1, torch.device("cuda")), torch.autocast("cuda", torch.bfloat16):
                loss = module.loss(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(capture, []).append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AutoencoderTraining("nothing"), "nothing is no folder with a config.json; give one, or one of dit-tr"),
        (lambda: AutoencoderTraining("svd-unet"), "describes a UNetSpatioTemporalConditionModel; give the folder of a"),
        (lambda: ImageDenoiserTraining(autoencoder="none"), "none is no folder with a config.json"),
        (lambda: ImageDenoiserTraining(scheduler="none"), "is not the scheduler of a pipeline"),
        (lambda: VideoDenoiserTraining(min_noise_aug=0.5), "give 0 < min_noise_aug <= max_noise_aug"),
        (lambda: AutoencoderTraining(freeze_encoder=True), "freeze_encoder needs a trained encoder; set start_from to"),
        (lambda: Optimizer(learning_rate=0.0), "learning_rate is 0.0 and warm_up 500 steps; give above 0"),
    ],
)
def test_bad_settings(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
