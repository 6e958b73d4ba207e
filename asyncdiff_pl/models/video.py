"""Image to video: Stable Video Diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from torch import nn
from typing_extensions import override

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import DiffusionPredictor
from asyncdiff_pl.models.decoding import to_pictures
from asyncdiff_pl.models.loading import WeightsSource
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.sources import read_component_config


class VideoPredictor(DiffusionPredictor):
    """Turns each sample's image into a video with Stable Video Diffusion.

    A video has the size of its image, in pixels; height and width must be multiples of 64.

    Args:
        pretrained: Checkpoint: a hub name, a local folder, or `tiny-svd`, which ships with the package.
        num_inference_steps: Number of denoising steps; a list runs every sample with each of them.
        num_frames: Number of frames of each video.
        fps: Frames per second that the video is meant to be shown at; the model is conditioned on it.
        motion_bucket_id: How much motion the video should have: 0 for little, 255 for much.
        noise_aug_strength: Standard deviation of the noise that is added to the image (whose values are -1 to 1);
            more noise takes the video further from the image and gives more motion.
        min_guidance_scale: Guidance scale of the first frame; the frames between are interpolated.
        max_guidance_scale: Guidance scale of the last frame; at 1 or below, nothing is guided and each step costs half.
        decode_chunk_size: Number of frames that are decoded at a time: fewer need less memory, more flicker less; null
            decodes all at once. Ranks that share a video decode different chunks of it.
        scheduler: The checkpoint's own if null, else a name (`euler_discrete`, `ddpm`, `ddim`, ...) or a class
            (`diffusers.DPMSolverMultistepScheduler`); it is built from the checkpoint's own scheduler config.
        seed: Seed of the run; each sample's noise follows from it and from the sample's id.
        dtype: Number format of weights and activations.
        weights: `pretrained` loads the checkpoint's weights; `random` builds the same network without them, for
            latency alone: its pictures mean nothing, and the results say so.
        variant: Variant of the checkpoint's weight files, `fp16` say; null takes the plain files.
        scheduler_config: Entries of the scheduler's config that differ from the checkpoint's, `{beta_schedule: linear}`
            say.
        forward_chunk_size: Number of frames whose feed-forward layers are computed at a time, which divides num_frames:
            fewer need less memory and more kernels; null computes all at once.
    """

    pipeline_class = StableVideoDiffusionPipeline

    def __init__(
        self,
        pretrained: str = "stabilityai/stable-video-diffusion-img2vid-xt",
        num_inference_steps: int | list[int] = 25,
        num_frames: int = 25,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.02,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        decode_chunk_size: int | None = 8,
        scheduler: str | None = None,
        seed: int = 0,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        weights: WeightsSource = "pretrained",
        variant: str | None = None,
        scheduler_config: dict[str, Any] | None = None,
        forward_chunk_size: int | None = None,
    ) -> None:
        super().__init__(pretrained, num_inference_steps, scheduler, seed, dtype, weights, variant, scheduler_config)
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; give 1 or more.")
        if decode_chunk_size is not None and decode_chunk_size < 1:
            raise ValueError(f"decode_chunk_size is {decode_chunk_size}; give 1 or more, or null for all frames.")
        if forward_chunk_size is not None and (forward_chunk_size < 1 or num_frames % forward_chunk_size):
            raise ValueError(
                f"forward_chunk_size is {forward_chunk_size} and num_frames {num_frames}; give a divisor or null."
            )
        if noise_aug_strength < 0:
            raise ValueError(f"noise_aug_strength is {noise_aug_strength}; give 0 or more.")
        if fps < 1:
            raise ValueError(f"fps is {fps}; give 1 or more.")
        self.num_frames = num_frames
        self.fps = fps
        self.motion_bucket_id = motion_bucket_id
        self.noise_aug_strength = noise_aug_strength
        self.min_guidance_scale = min_guidance_scale
        self.max_guidance_scale = max_guidance_scale
        self.decode_chunk_size = decode_chunk_size
        self.forward_chunk_size = forward_chunk_size

    @override
    def load(self) -> DiffusionPipeline:
        pipeline = super().load()
        if self.forward_chunk_size is not None:
            pipeline.unet.enable_forward_chunking(self.forward_chunk_size)
        return pipeline

    @property
    @override
    def frames_per_sample(self) -> int:
        return self.num_frames

    @property
    @override
    def size_multiple(self) -> int | None:
        unet_config = read_component_config(self.pretrained, "unet")
        vae_config = read_component_config(self.pretrained, "vae")
        if unet_config is None or vae_config is None:
            return None
        # the way back up only doubles: an odd size on the way down would not come out again
        return _halvings(vae_config) * _halvings(unet_config)

    @property
    @override
    def is_guided(self) -> bool:
        return self.max_guidance_scale > 1

    @override
    def example_call(self, height: int, width: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
        unet_config = read_component_config(self.pretrained, "unet")
        vae_config = read_component_config(self.pretrained, "vae")
        if unet_config is None or vae_config is None:
            return None
        with torch.device("meta"):
            unet = UNetSpatioTemporalConditionModel.from_config(unet_config)
            # the mixing factors ignore the device above; the method of diffusers' own class warns at each cast
            nn.Module.to(unet.requires_grad_(False).eval(), "meta", self.torch_dtype)
            scale = _halvings(vae_config)
            batch = 2 if self.is_guided else 1
            shape = (batch, self.num_frames, unet.config.in_channels, height // scale, width // scale)
            embedding = torch.empty(batch, 1, unet.config.cross_attention_dim, dtype=self.torch_dtype)
            args = (torch.empty(shape, dtype=self.torch_dtype), torch.empty(()))
            times = torch.empty(batch, 3, dtype=self.torch_dtype)
        return unet, args, {"encoder_hidden_states": embedding, "added_time_ids": times, "return_dict": False}

    @override
    def generate(
        self, samples: Sequence[Sample], num_inference_steps: int, generators: list[torch.Generator]
    ) -> list[list[Image.Image]]:
        width, height = self._size(samples)
        # diffusers 0.42 warns twice a sample that the decoder's casts to float32 and back may lose precision
        with quiet_libraries():
            latents = self.pipeline(
                [sample.image for sample in samples],
                height=height,
                width=width,
                num_frames=self.num_frames,
                num_inference_steps=num_inference_steps,
                min_guidance_scale=self.min_guidance_scale,
                max_guidance_scale=self.max_guidance_scale,
                fps=self.fps,
                motion_bucket_id=self.motion_bucket_id,
                noise_aug_strength=self.noise_aug_strength,
                generator=generators,
                output_type="latent",
            ).frames
        return [self._decode(video) for video in latents]

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        # one video at a time: the pipeline's own decoding cuts a batch into chunks that run across two videos, and the
        # decoder would blend the one's last frames into the other's first
        chunk = self.decode_chunk_size or self.num_frames
        with torch.no_grad():
            video = self.pipeline.decode_latents(latents[None], self.num_frames, chunk)
        return to_pictures(self.pipeline.video_processor.postprocess_video(video, output_type="pt")[0])

    def _size(self, samples: Sequence[Sample]) -> tuple[int, int]:
        sizes: dict[tuple[int, int], str] = {}
        for sample in samples:
            if sample.image is None:
                raise ValueError(f"Sample {sample.id} has no image; a video starts from one, so give each sample one.")
            sizes.setdefault(sample.image.size, sample.id)
        if len(sizes) > 1:
            listed = ", ".join(f"{name} {width}x{height}" for (width, height), name in sizes.items())
            raise ValueError(f"The images of one batch differ in size ({listed}); resize them or take batch size 1.")
        (width, height), name = next(iter(sizes.items()))
        multiple = self.pipeline.vae_scale_factor * _halvings(self.denoiser.config)
        if width % multiple or height % multiple:
            raise ValueError(
                f"The image of sample {name} has {width}x{height} pixels; both must be multiples of {multiple}."
            )
        return width, height


def _halvings(config: Mapping[str, Any]) -> int:
    """How many times smaller the last level of a network is than its first: each level but the last halves it."""
    return 2 ** (len(config["block_out_channels"]) - 1)
