"""The pipeline of DDPMs: pictures from nothing but seeds, by DDPM's or DDIM's steps over any timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from asyncdiff_pl.sampling.respaced import RespacedScheduler
from asyncdiff_pl.sampling.seeded_noise import seeded_normal


class UnconditionalPipeline(DiffusionPipeline):
    """Makes pictures with a `UNet2DModel`, from the folder of a `DDPMPipeline` or a `DDIMPipeline`.

    It differs from these in three things: timesteps may be any, all noise of a picture follows from its seed, without
    a call for each picture, and states between steps are float32, whatever the network computes in.

    Args:
        unet: The network.
        scheduler: A `RespacedScheduler`, or another that one is made like.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        if not isinstance(scheduler, RespacedScheduler):
            scheduler = RespacedScheduler.like(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        seeds: Sequence[int],
        num_inference_steps: int = 50,
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> ImagePipelineOutput:
        """Makes a picture of each seed.

        Args:
            seeds: Seeds of the pictures' noise, from 0 to 2⁶³ − 1.
            num_inference_steps: Number of denoising steps, 1 to the number of training timesteps.
            output_type: `pil`; `np`, uint8 [N, H, W, 3]; or `pt`, [N, 3, H, W] from 0 to 1, on the network's device.
        """
        device, config, dtype = self.unet.device, self.unet.config, self.unet.dtype
        size = config.sample_size
        shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        keys = torch.tensor(seeds, dtype=torch.int64).to(device)
        self.scheduler.set_timesteps(num_inference_steps)
        state = seeded_normal(keys, 0, shape)
        for number, timestep in enumerate(self.progress_bar(self.scheduler.timesteps), 1):
            output = self.unet(state.to(dtype), timestep).sample.float()
            noise = seeded_normal(keys, number, shape) if self.scheduler.stochastic else None
            state = self.scheduler.step(output, timestep, state, noise).prev_sample
        if output_type == "pt":
            return ImagePipelineOutput(images=(state / 2 + 0.5).clamp(0, 1))
        pictures = to_bytes(state).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return ImagePipelineOutput(images=pictures)
        return ImagePipelineOutput(images=[Image.fromarray(picture) for picture in pictures])


def to_bytes(states: Tensor) -> Tensor:
    """Pictures from −1 to 1 as uint8, of the same shape."""
    return (states.clamp(-1, 1) * 127.5 + 127.5).round().byte()
