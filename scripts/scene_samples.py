"""What the scripts that judge the embedded models share: held-out scenes, batched pipeline calls and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableVideoDiffusionPipeline
from sheets import rounded, to_images
from torch import Tensor

from asyncdiff_pl.data.scenes import Scenes, captions, draw, sample_scenes
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.base import DTYPES
from asyncdiff_pl.models.clip import load_clip
from asyncdiff_pl.models.loading import load_pipeline
from asyncdiff_pl.models.noise import sample_seed
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.training.motion import motion_bucket

FPS = 7
"""Frames per second of true clips, and what tiny-svd is told."""
ATTENTION_LIMIT = 65_536
"""CUDA's attention over time fails when clips x latent pixels reach this."""


# -- held-out scenes ------------------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """Scenes that no model has seen in training, as pixels and words.

    Args:
        scenes: B scenes of the split `test`.
        clips: [B, F, 3, H, W], float32 on the CPU, values k / 255.
        captions: Five for each scene.
    """

    scenes: Scenes
    clips: Tensor
    captions: list[tuple[str, ...]]

    @property
    def pictures(self) -> Tensor:
        """The first frames, [B, 3, H, W]."""
        return self.clips[:, 0]

    @property
    def motion_bucket_ids(self) -> list[float]:
        """How much each clip really moves, in the measure that tiny-svd was trained with."""
        return motion_bucket(self.clips).tolist()


def held_out(
    count: int, num_frames: int = 1, device: torch.device | str = "cpu", max_objects: int = 3, batch_size: int = 64
) -> HeldOut:
    """Draws the first scenes of the split `test`.

    Args:
        count: Number of scenes.
        num_frames: Frames of each clip, at 7 frames per second from t = 0.
        device: Where they are drawn.
        max_objects: Objects of a scene, at most.
        batch_size: Scenes that are drawn at a time.
    """
    times = torch.arange(num_frames, device=device) / FPS
    parts, words = [], []
    for start in range(0, count, batch_size):
        index = torch.arange(start, min(start + batch_size, count), device=device)
        scenes = sample_scenes(index, "test", max_objects=max_objects, device=device)
        parts.append(rounded(draw(scenes, times.expand(len(index), -1))).cpu())
        words += captions(scenes)
    every = sample_scenes(torch.arange(count), "test", max_objects=max_objects)
    return HeldOut(every, torch.cat(parts), words)


# -- pipelines --------------------------------------------------------------------------------------------------------


def compute_exactly() -> None:
    """Has float32 computed as float32, where a GPU would round to TF32, and the same again each time."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


class PerSceneMotion(StableVideoDiffusionPipeline):
    """Takes a list as `motion_bucket_id`, one number for each image of a call; all else is as in diffusers."""

    def _get_add_time_ids(
        self,
        fps: int,
        motion_bucket_id: Sequence[float],
        noise_aug_strength: float,
        dtype: torch.dtype,
        batch_size: int,
        num_videos_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> Tensor:
        rows = [
            super(PerSceneMotion, self)._get_add_time_ids(
                fps, number, noise_aug_strength, dtype, 1, num_videos_per_prompt, False
            )
            for number in motion_bucket_id
        ]
        return torch.cat(rows * 2 if do_classifier_free_guidance else rows)


def load(kind: type[DiffusionPipeline], pretrained: str, dtype: str, device: torch.device | str) -> DiffusionPipeline:
    """Loads a pipeline, silent and ready on a device; Stable Video Diffusion takes motion scene by scene.

    Args:
        kind: Class of the pipeline.
        pretrained: Name of an embedded pipeline, a folder, or a hub name.
        dtype: float32, float16 or bfloat16.
        device: Where it goes.
    """
    pipe = load_pipeline(kind, pretrained, "pretrained", DTYPES[dtype])
    if isinstance(pipe, StableVideoDiffusionPipeline):
        pipe = PerSceneMotion(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@torch.no_grad()
def generate_videos(
    pipe: PerSceneMotion,
    pictures: Tensor,
    motion_bucket_ids: Sequence[float],
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> Tensor:
    """Videos from pictures, with the pipeline's own guidance, 1 to 3, at 7 frames per second.

    Args:
        pipe: The pipeline.
        pictures: [B, 3, H, W], values from 0 to 1.
        motion_bucket_ids: One for each picture.
        steps: Denoising steps.
        batch_size: Videos of one call.
        seed: With the scene's number the seed of its noise.

    Returns:
        [B, F, 3, H, W], float32 on the CPU, values from 0 to 1.

    Raises:
        ValueError: The batch is too large for attention on a GPU.
    """
    height, width = pictures.shape[-2:]
    largest = (ATTENTION_LIMIT - 1) // (2 * (height // pipe.vae_scale_factor) * (width // pipe.vae_scale_factor))
    if pipe.device.type == "cuda" and batch_size > largest:
        raise ValueError(
            f"A batch of {batch_size} videos of {width}x{height} pixels is too large for attention over time on a GPU; "
            f"take {largest} or fewer."
        )
    num_frames, videos = pipe.unet.config.num_frames, []
    for part in _batches(len(pictures), batch_size):
        with quiet_libraries():
            latents = pipe(
                to_images(pictures[part]),
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=steps,
                fps=FPS,
                motion_bucket_id=motion_bucket_ids[part],
                generator=_generators(part, seed),
                output_type="latent",
            ).frames
        # all videos of the batch at once; the pipeline itself would take them one after the other
        scaled = latents.flatten(0, 1).to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        frames = pipe.vae.decode(scaled, num_frames=num_frames).sample.unflatten(0, (-1, num_frames))
        videos.append((frames.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(videos)


@torch.no_grad()
def generate_pictures(
    pipe: DiffusionPipeline,
    argument: str,
    conditions: Sequence[Any],
    guidance_scale: float,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> Tensor:
    """Pictures from prompts or classes.

    Args:
        pipe: The pipeline.
        argument: What it calls its conditions: `prompt` or `class_labels`.
        conditions: One for each picture.
        guidance_scale: Guidance scale.
        steps: Denoising steps.
        batch_size: Pictures of one call.
        seed: With the picture's number the seed of its noise.

    Returns:
        [B, 3, H, W], float32 on the CPU, values from 0 to 1.
    """
    pictures = []
    for part in _batches(len(conditions), batch_size):
        found = pipe(
            **{argument: list(conditions[part])},
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=_generators(part, seed),
            output_type="pt",
        ).images
        pictures.append(found.float().cpu())
    return torch.cat(pictures)


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    return (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def _generators(part: slice, seed: int) -> list[torch.Generator]:
    # on the CPU, one a sample: neither device nor batch size changes the noise
    return [torch.Generator().manual_seed(sample_seed(seed, str(index))) for index in range(part.start, part.stop)]


# -- scores -----------------------------------------------------------------------------------------------------------


class Scorer:
    """CLIP over tensors and many texts, in float32, through the model's own processor.

    Args:
        model: `tiny-clip`, a folder or a hub name.
        device: Where it runs.
        batch_size: Pictures of one forward pass; of texts there are four times as many.
    """

    def __init__(self, model: str = "tiny-clip", device: torch.device | str = "cpu", batch_size: int = 128) -> None:
        self.score = TextImageScore(*load_clip(model, device), batch_size=batch_size)
        self.batch_size = batch_size

    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors of pictures [N, 3, H, W] with values from 0 to 1: [N, D]."""
        parts = [self.score.embed_images(to_images(pictures[p])) for p in _batches(len(pictures), self.batch_size)]
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts: [C, D]."""
        parts = [self.score.embed_texts(texts[p]) for p in _batches(len(texts), 4 * self.batch_size)]
        return torch.cat(parts)

    def frames(self, clips: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
        """CLIP score of each frame, 100 x cosine, the mean over its clip's captions.

        Args:
            clips: [B, F, 3, H, W], values from 0 to 1.
            captions: For each clip C texts.

        Returns:
            [B, F], on the CPU.
        """
        images = self.images(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        texts = self.texts([text for own in captions for text in own]).unflatten(0, (len(clips), -1))
        return 100 * torch.einsum("bfd,bcd->bfc", images, texts).mean(2).cpu()
