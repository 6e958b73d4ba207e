"""Tiny denoisers of the real classes, float32 on the CPU, with inputs and a sampling loop; and the full-size ones."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers import UNetSpatioTemporalConditionModel as UNetVideo
from torch import nn

FRAMES = 3
GAIN = 3**0.5
"""What makes the output of a layer with torch's initial weights as large as its input."""
TEXT = 24
"""Width of the text embeddings."""
NAMES = ("sd15", "sd21", "sdxl", "svd", "animatediff")


def build(name: str) -> nn.Module:
    """A tiny denoiser with random weights, the same in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        denoiser = _TINY[name]()
    with torch.no_grad():
        # fresh weights hardly react to their input: a stale tensor must show
        for weight in denoiser.parameters():
            if weight.ndim > 1:
                weight.mul_(GAIN)
    return denoiser.requires_grad_(False).eval()


def _tiny_image(**config: Any) -> UNet2DConditionModel:
    config = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": TEXT} | config
    return UNet2DConditionModel(sample_size=8, **config)


def _tiny_sd15() -> UNet2DConditionModel:
    return _tiny_image(attention_head_dim=8)


def _tiny_sdxl() -> UNet2DConditionModel:
    return _tiny_image(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


_TINY: dict[str, Callable[[], nn.Module]] = {
    "sd15": _tiny_sd15,
    "sd21": lambda: _tiny_image(layers_per_block=1, attention_head_dim=(2, 2, 4, 4), use_linear_projection=True),
    "sdxl": _tiny_sdxl,
    "svd": lambda: UNetVideo(
        sample_size=8,
        num_frames=FRAMES,
        layers_per_block=1,
        block_out_channels=(32, 32, 64, 64),
        num_attention_heads=(2, 2, 4, 4),
        cross_attention_dim=TEXT,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
    ),
    "animatediff": lambda: UNetMotionModel.from_unet2d(
        _tiny_image(layers_per_block=1, attention_head_dim=8),
        MotionAdapter(
            motion_layers_per_block=1,
            block_out_channels=(32, 32, 64, 64),
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
            use_motion_mid_block=False,
        ),
    ),
}


def build_full(name: str) -> nn.Module:
    """The denoiser of the published checkpoint on the meta device, in half precision."""
    with torch.device("meta"):
        denoiser = _FULL[name]()
        # SVD's mixing factors ignore the device above
        return nn.Module.to(denoiser, "meta", torch.float16).requires_grad_(False).eval()


_FULL: dict[str, Callable[[], nn.Module]] = {
    "sd15": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": lambda: UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl": lambda: UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "svd": lambda: UNetVideo(sample_size=96, num_frames=25, num_attention_heads=(5, 10, 20, 20)),
    "animatediff": lambda: UNetMotionModel.from_unet2d(_FULL["sd15"](), MotionAdapter(use_motion_mid_block=False)),
}


def full_call(name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Arguments of one call at the published resolution, guidance batch 2, on the meta device."""

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    time = torch.empty((), dtype=torch.int64, device="meta")
    if name == "svd":
        kwargs = {"encoder_hidden_states": half(2, 1, 1024), "added_time_ids": half(2, 3)}
        return (half(2, 25, 8, 72, 128), time), kwargs
    if name == "animatediff":
        return (half(2, 4, 16, 64, 64), time), {"encoder_hidden_states": half(32, 77, 768)}
    size, width = {"sd15": (64, 768), "sd21": (96, 1024), "sdxl": (128, 2048)}[name]
    kwargs = {"encoder_hidden_states": half(2, 77, width)}
    if name == "sdxl":
        kwargs["added_cond_kwargs"] = {"text_embeds": half(2, 1280), "time_ids": half(2, 6)}
    return (half(2, 4, size, size), time), kwargs


def one_level(width: int = 32, **config: Any) -> nn.Module:
    """A denoiser with few kinds of blocks, in double precision, for a sampler of sd21."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    torch.manual_seed(3)
    denoiser = UNet2DConditionModel(
        sample_size=8, block_out_channels=(width,), layers_per_block=1, cross_attention_dim=TEXT, **blocks, **config
    )
    # past diffusers' own method, which warns
    return nn.Module.to(denoiser, torch.float64).requires_grad_(False).eval()


class Sampler:
    """One sample's inputs, and the loop around a denoiser with classifier-free guidance.

    Args:
        name: Which denoiser.
        batch: Pictures or videos at once.
        size: Height and width of the latents.
        seed: Seed of latents and conditions.
    """

    guidance = 3.0

    def __init__(self, name: str, batch: int = 1, size: int = 8, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        shape = {"svd": (batch, FRAMES, 4, size, size), "animatediff": (batch, 4, FRAMES, size, size)}
        self.latents = draw(*shape.get(name, (batch, 4, size, size)))
        self.condition = draw(2 * batch, *self.latents.shape[1:]) if name == "svd" else None
        text = draw(2 * batch, 1 if name == "svd" else 5, TEXT)
        self.kwargs: dict[str, Any] = {"encoder_hidden_states": text}
        if name == "animatediff":
            self.kwargs["encoder_hidden_states"] = text.repeat_interleave(FRAMES, 0)
        if name == "svd":
            self.kwargs["added_time_ids"] = torch.tensor([[6.0, 127.0, 0.02]] * 2 * batch)
        if name == "sdxl":
            ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2 * batch)
            self.kwargs["added_cond_kwargs"] = {"text_embeds": draw(2 * batch, 16), "time_ids": ids}

    def call(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's first argument, for latents that are scaled already."""
        pair = torch.cat([latents] * 2)
        return pair if self.condition is None else torch.cat([pair, self.condition], 2)

    def estimate(self, denoiser: nn.Module, scheduler: Any, latents: torch.Tensor, t: torch.Tensor, **more: Any):
        """The guided noise estimate."""
        given = self.call(scheduler.scale_model_input(latents, t))
        output = denoiser(given, t, **self.kwargs, **more, return_dict=False)[0]
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def __call__(
        self,
        denoiser: nn.Module,
        scheduler: Any = None,
        steps: int = 10,
        before_step: Callable[[int], dict[str, Any]] = lambda step: {},
        start: int = 0,
        stop: int | None = None,
    ) -> torch.Tensor:
        """Final latents.

        Args:
            denoiser: The network.
            scheduler: DDIM if None.
            steps: Number of steps.
            before_step: Called with the step's number; gives further arguments of the denoiser.
            start: First index of the timesteps that is run, as image to image does.
            stop: Index of the timesteps before which the sample is broken off.
        """
        scheduler = scheduler or ddim()
        scheduler.set_timesteps(steps)
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        latents = self.latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for step, t in enumerate(scheduler.timesteps[start:stop]):
            estimate = self.estimate(denoiser, scheduler, latents, t, **before_step(step))
            latents = scheduler.step(estimate, t, latents).prev_sample
        return latents


def ddim() -> DDIMScheduler:
    """The scheduler of most tests."""
    return DDIMScheduler(clip_sample=False)


def deviation_error(found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> float:
    """How far `found` is from `expected`, relative to what `expected` deviates from the exact result."""
    deviation = float((expected - exact).norm())
    assert deviation > 1e-3 * float(exact.norm()), "the schedule shows too little to be tested"
    return float((found - expected).norm()) / deviation
