"""DDPM's training: what its loss is, that a stopped run goes on as if it had not, and that ranks add up."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from asyncdiff_pl.callbacks import TrainingState, WeightAverage
from asyncdiff_pl.data import Cifar10
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.unconditional_unet import build_unet
from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.training.loss_weights import LearnedUncertainty, MinSNRWeight
from asyncdiff_pl.training.noise_schedule import betas, signal_levels
from asyncdiff_pl.training.timesteps import LossSecondMoment, TimestepSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from ranks import run_ranks

TINY = {"size": 8, "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "num_timesteps": 20}
TINY |= {"sample_steps": 4, "num_samples": 4}
SMALL_STEPS = Optimizer(1e-3, 0.0, 0.999, 2, "constant")
QUIET = {
    **{"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    **{"num_sanity_val_steps": 0, "use_distributed_sampler": False},
}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    module = DDPM(**TINY | {"optimizer": SMALL_STEPS} | settings)
    for parameter in module.network.parameters():
        # what begins at 0 has a gradient of its own, but gives the layers before it none
        nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return module


def test_the_network_of_the_defaults_has_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in build_unet(32).parameters()) == 35_746_307


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine", "warmup"])
def test_the_loss_worked_out_by_hand(kind, schedule):
    module = build(prediction_type=kind, beta_schedule=schedule, weight=MinSNRWeight(), dropout=0.0)
    frames = torch.rand(6, 1, 3, 8, 8)
    torch.manual_seed(3)
    found = module.loss({"frames": frames})
    torch.manual_seed(3)
    timesteps, noise = torch.randint(20, (6,)), torch.randn(6, 3, 8, 8)
    level = signal_levels(betas(schedule, 20))[timesteps].float()
    signal, spread = level.sqrt().view(-1, 1, 1, 1), (1 - level).sqrt().view(-1, 1, 1, 1)
    clean = frames[:, 0] * 2 - 1
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[kind]
    output = module.network(signal * clean + spread * noise, timesteps).sample
    errors = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    snr = level / (1 - level)
    weights = {"epsilon": snr.clamp(max=5) / snr, "v_prediction": snr.clamp(max=5) / (snr + 1), "sample": snr}[kind]
    torch.testing.assert_close(found["mse"], errors.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["loss"], (weights.clamp(max=5) * errors).mean(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("schedule", "variance"), [("linear", "fixed_small"), ("warmup", "fixed_large")])
def test_what_is_exported_is_a_pipeline(schedule, variance, tmp_path):
    module = build(beta_schedule=schedule, variance=variance, channels_last=True)
    module.export(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.variance_type == variance
    torch.testing.assert_close(pipeline.scheduler.betas.double(), betas(schedule, 20), atol=1e-7, rtol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2).images[1].size == (8, 8)
    # and it makes what the module shows in validation
    own = UnconditionalPipeline.from_pretrained(tmp_path)
    own.set_progress_bar_config(disable=True)
    module.eval()
    shown = module.pipeline()([4, 5], 3, "pt").images
    torch.testing.assert_close(own([4, 5], 3, "pt").images, shown, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"size": 10, "multipliers": (1, 2, 2)},
            "size is 10 pixels, and 3 levels halve it 2 times; give a",
        ),
        ({"attention": (16,)}, r"attention is \[16\], but the levels are \[8, 4\] pixels high"),
        ({"sample_steps": 21}, "sample_steps is 21, and there are 20 timesteps; give 1 to 20"),
        ({"dropout": 1.0}, "dropout is 1.0; give a share from 0 to below 1"),
    ],
)
def test_networks_that_cannot_be(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DDPM(**TINY | settings)


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match=r"pictures of 8 x 16 pixels, and model\.size is 8; make them equal"):
        build().loss({"frames": torch.zeros(2, 1, 3, 8, 16)})


# -- a run that is stopped --------------------------------------------------------------------------------------


class Losses(DDPM):
    """Keeps its losses by step."""

    def loss(self, batch):
        parts = super().loss(batch)
        self.seen.append(float(parts["loss"].detach()))
        return parts


def fit(folder, steps, resume=None):
    # other weights and another random state than the run that goes on had: the checkpoint must hold all
    torch.manual_seed(7)
    module = Losses(**TINY, timesteps=LossSecondMoment(history=2), weight=LearnedUncertainty(8), optimizer=SMALL_STEPS)
    module.seen = []
    torch.manual_seed(1)
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[WeightAverage(0.9), TrainingState(4)],
        logger=TensorBoardLogger(folder, name="run", version=0),
        **QUIET,
    )
    trainer.fit(
        module, datamodule=Cifar10(str(folder / "set.npz"), batch_size=4, validation_images=4), ckpt_path=resume
    )
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_stopped_run_has_the_losses_of_one_that_was_not(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        generator = np.random.default_rng(0)
        np.savez(tmp_path / name / "set.npz", images=generator.integers(0, 256, (18, 8, 8, 3), dtype=np.uint8))
    whole = fit(tmp_path / "whole", 9)
    fit(tmp_path / "parts", 4)
    rest = fit(tmp_path / "parts", 9, tmp_path / "parts" / "run" / "version_0" / "checkpoints" / "last.ckpt")
    assert len(whole.seen) == 18
    assert rest.seen == whole.seen[8:]
    assert len(set(whole.seen)) == 18
    for (name, one), (_, other) in zip(whole.state_dict().items(), rest.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore")
def test_fused_steps_clip_gradients_in_mixed_precision_as_well():
    module = build()
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, **settings, **QUIET)
    trainer.fit(module, DataLoader([{"frames": torch.rand(4, 1, 3, 8, 8)}], batch_size=None))
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


# -- ranks ------------------------------------------------------------------------------------------------------


class Given(TimestepSampler):
    """Draws what the picture says, and has a weight that the loss knows nothing of."""

    every = 1

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(2))
        self.register_buffer("mean_loss", torch.zeros(()))
        self.register_buffer("moved", torch.zeros(()))

    def draw(self, clean):
        return (clean[:, 0, 0, 0].abs() * 1000).long() % self.number, 1 + clean[:, 0, 0, 1].abs()

    def update(self, timesteps, losses):
        self.mean_loss.copy_(self.reduce(losses.mean()))
        assert len(self.gather(losses)) == 4

    def before_step(self, probe, clean):
        self.before = probe(torch.zeros(len(clean), dtype=torch.long), clean, torch.ones_like(clean)).mean()

    def after_step(self, probe, clean):
        after = probe(torch.zeros(len(clean), dtype=torch.long), clean, torch.ones_like(clean)).mean()
        self.moved.copy_(self.reduce(self.before - after))


def one_step(rank, ranks, folder):
    """Trains a step on this rank's share of four pictures, and keeps what came of it."""
    torch.set_grad_enabled(True)
    if ranks > 1:
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), NODE_RANK="0", GLOBAL_RANK=str(rank))
    module = build(dropout=0.0, timesteps=Given(), weight=LearnedUncertainty(8))
    frames = torch.rand(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    # noise by picture: with that of the ranks no two batches would be alike
    torch.randn_like, drawn = (lambda clean: clean.flip(-1) * 2), torch.randn_like
    try:
        trainer = Trainer(
            max_steps=1,
            devices=ranks,
            strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            gradient_clip_val=1.0,
            **QUIET,
        )
        # before a step, whose rounding would tell ranks apart
        losses = [
            trainer.validate(module, datamodule=Cifar10(str(folder / "set.npz"), batch_size=batch), verbose=False)
            for batch in (2, 3)
        ]
        trainer.fit(module, DataLoader([{"frames": frames.chunk(ranks)[rank]}], batch_size=None))
    finally:
        torch.randn_like = drawn
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    state = {name: module.state_dict()[f"timesteps.{name}"] for name in ("mean_loss", "moved")}
    state["validation"] = torch.tensor([found["validation/loss"] for (found,) in losses])
    torch.save((gradients, module.state_dict(), state), folder / f"{ranks}-{rank}.pt")


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_have_the_gradients_and_the_validation_loss_of_one(tmp_path):
    # of two ranks one has a picture less
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    one_step(0, 1, tmp_path)
    run_ranks(2, one_step, 2, tmp_path)
    alone, *both = [torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]
    # the network's and the weight's, not the sampler's
    assert {name.partition(".")[0] for name in alone[0]} == {"network", "weight"}
    assert sum(gradient.norm() > 1e-4 for gradient in alone[0].values()) > 40
    for gradients, weights, state in both:
        for name, expected in alone[0].items():
            torch.testing.assert_close(gradients[name], expected, atol=1e-6, rtol=1e-3, msg=name)
        for name, value in state.items():
            torch.testing.assert_close(value, alone[2][name], atol=1e-6, rtol=1e-3, msg=name)
        assert alone[2]["moved"] != 0
        assert len(set(state["validation"].round(decimals=4).tolist())) == 1  # whatever the batches are
        assert torch.equal(weights["network.conv_in.weight"], both[0][1]["network.conv_in.weight"])
