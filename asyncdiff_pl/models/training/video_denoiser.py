"""Trains the denoiser of Stable Video Diffusion: a picture, the amount of motion and the frame rate give a clip."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from typing_extensions import override

from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.training.autoencoder import encode
from asyncdiff_pl.models.training.base import Batch, NetworkTraining, drawn_from, to_pil
from asyncdiff_pl.models.training.components import frozen_network, new_network, read_scheduler
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.training.continuous_noise import LogNormalSigmas, v_preconditioning, v_target
from asyncdiff_pl.training.motion import motion_bucket
from asyncdiff_pl.training.pictures import normalise, resize_as_svd

VALIDATION_SIGMAS = (0.05, 0.5, 2.0, 10.0, 100.0)
"""Noise levels at which the loss is measured."""

MOST_SEQUENCES = 65_535
"""Attention over time has a sequence for each latent pixel of each clip; CUDA's grid takes no more."""


class VideoDenoiserTraining(NetworkTraining):
    """Trains the network of `StableVideoDiffusionPipeline` for clips of a picture.

    As the pipeline has it, the picture is given twice: as an embedding, and as latents of the picture with some noise.
    The amount of motion is measured on the true clip.

    Args:
        architecture: A folder with the config.json of a `UNetSpatioTemporalConditionModel`, or the name of a component
            of the package.
        autoencoder: A trained autoencoder: a folder as exported, or the name of a component.
        clip: A trained CLIP model: a folder as exported, or the name of a component.
        scheduler: The pipeline whose scheduler draws samples: an embedded one, or a folder.
        sigma_mean: Mean of the logarithm of the noise levels.
        sigma_std: Standard deviation of the logarithm of the noise levels.
        even_share: Share of noise levels spread evenly over the scheduler's range, on a logarithmic scale.
        drop_condition: Share of clips that are trained without the picture, for guidance.
        min_noise_aug: Least noise on the picture, as `noise_aug_strength`; its logarithm is drawn evenly.
        max_noise_aug: Most noise on the picture.
        sample_steps: Denoising steps of the clips that are drawn in validation.
        num_samples: Number of clips that are drawn in validation; 0 for none.
        optimizer: How the weights follow the gradients.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported, or the name of a component; null draws new ones.
        capture: Record the network's forward and backward pass as CUDA graphs: several times faster steps on a GPU.
    """

    def __init__(
        self,
        architecture: str = "svd-unet",
        autoencoder: str = "scene-video-autoencoder",
        clip: str = "scene-clip",
        scheduler: str = "tiny-svd",
        sigma_mean: float = 0.5,
        sigma_std: float = 1.6,
        even_share: float = 0.1,
        drop_condition: float = 0.1,
        min_noise_aug: float = 0.005,
        max_noise_aug: float = 0.2,
        sample_steps: int = 12,
        num_samples: int = 4,
        optimizer: Optimizer = Optimizer(),
        compile: bool = False,
        start_from: str | None = None,
        capture: bool = False,
    ) -> None:
        network = new_network(UNetSpatioTemporalConditionModel, architecture)
        super().__init__(network, optimizer, compile, start_from, capture)
        if not 0 < min_noise_aug <= max_noise_aug:
            raise ValueError(
                f"min_noise_aug is {min_noise_aug} and max_noise_aug {max_noise_aug}; give 0 < min_noise_aug <= "
                "max_noise_aug."
            )
        self.autoencoder_folder, self.clip_folder = find_component(autoencoder), find_component(clip)
        self.scheduler = read_scheduler(scheduler)
        config = self.scheduler.config
        self.sigmas = LogNormalSigmas(sigma_mean, sigma_std, even_share, config.sigma_min, config.sigma_max)
        self.drop_condition = drop_condition
        self.noise_aug = (min_noise_aug, max_noise_aug)
        self.sample_steps = sample_steps
        self.num_samples = num_samples
        self.processor = CLIPImageProcessor.from_pretrained(self.clip_folder)
        self.register_buffer("mean", torch.tensor(self.processor.image_mean), persistent=False)
        self.register_buffer("std", torch.tensor(self.processor.image_std), persistent=False)

    @override
    def load_frozen(self) -> dict[str, nn.Module]:
        return {
            "vae": frozen_network(AutoencoderKLTemporalDecoder, str(self.autoencoder_folder)),
            "image_encoder": frozen_network(CLIPVisionModelWithProjection, str(self.clip_folder)),
        }

    # -- what the network is conditioned on ---------------------------------------------------------------------

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Image embeddings [B, 1, D] of pictures [B, 3, H, W] from 0 to 1, as the pipeline makes them."""
        encoder = self.frozen["image_encoder"]
        pixels = normalise(resize_as_svd(pictures, encoder.config.image_size), self.mean, self.std)
        return encoder(pixel_values=pixels).image_embeds[:, None].float()

    @torch.no_grad()
    def condition_latents(self, pictures: Tensor, noise_aug: Tensor) -> Tensor:
        """Latents [B, C, h, w] of pictures with some noise: the mode, not scaled, as the pipeline has it.

        Args:
            pictures: [B, 3, H, W], pixels from 0 to 1.
            noise_aug: [B], strength of the noise for pixels from −1 to 1.
        """
        # half the strength, since pixels go from 0 to 1 here
        noisy = pictures + noise_aug.view(-1, 1, 1, 1) / 2 * torch.randn_like(pictures)
        return encode(self.frozen["vae"], noisy)

    @torch.no_grad()
    def clip_latents(self, clips: Tensor) -> Tensor:
        """Scaled latents [B, F, C, h, w] of clips [B, F, 3, H, W] from 0 to 1: what is to be generated."""
        vae = self.frozen["vae"]
        return encode(vae, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]) * vae.config.scaling_factor

    @staticmethod
    def time_ids(motion: Tensor, fps: Tensor, noise_aug: Tensor) -> Tensor:
        """The three numbers [B, 3] that the network is told: frame rate less one, motion, noise on the picture."""
        return torch.stack([fps.to(noise_aug) - 1, motion.to(noise_aug), noise_aug], dim=1)

    # -- training -----------------------------------------------------------------------------------------------

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        clips = batch["frames"]
        number, device = len(clips), clips.device
        keep = (torch.rand(number, device=device) >= self.drop_condition).float()
        return {"loss": self._losses(batch, self.sigmas.draw(number, device), keep).mean()}

    @override
    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        clips = batch["frames"]
        found = {}
        for sigma in VALIDATION_SIGMAS:
            with drawn_from(number, clips.device):
                levels = torch.full((len(clips),), sigma, device=clips.device)
                found[f"loss_at_{sigma}"] = self._losses(batch, levels, torch.ones_like(levels)).mean()
        return {"loss": torch.stack([*found.values()]).mean(), **found}

    def _losses(self, batch: Batch, sigma: Tensor, keep: Tensor) -> Tensor:
        """The loss of each clip [B].

        Args:
            batch: The clips.
            sigma: [B], noise levels.
            keep: [B], 1 or 0: whether the network sees the picture.
        """
        clips = batch["frames"]
        low, high = self.noise_aug
        noise_aug = low * (high / low) ** torch.rand(len(clips), device=clips.device)
        latents, embedding, motion = self._once(clips, self._encode)
        self._check_size(latents)
        condition = self.condition_latents(clips[:, 0], noise_aug) * keep.view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        around = v_preconditioning(level)
        inputs = torch.cat(
            [around.c_in * (latents + level * noise), condition[:, None].expand(-1, latents.shape[1], -1, -1, -1)], 2
        )
        output = self.call_network(
            sample=inputs,
            timestep=around.c_noise.flatten(),
            encoder_hidden_states=embedding * keep.view(-1, 1, 1),
            added_time_ids=self.time_ids(motion, batch["fps"], noise_aug),
        )
        return F.mse_loss(output.float(), v_target(latents, noise, level), reduction="none").flatten(1).mean(1)

    def _encode(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, embeddings of the first frames and amounts of motion, none of which depend on the noise."""
        return self.clip_latents(clips), self.embed_pictures(clips[:, 0]), motion_bucket(clips)

    @staticmethod
    def _check_size(latents: Tensor) -> None:
        number, height, width = len(latents), *latents.shape[-2:]
        if latents.device.type == "cuda" and number * height * width > MOST_SEQUENCES:
            raise ValueError(
                f"{number} clips of {height} x {width} latents are too many for attention over time on a GPU; set "
                f"data.batch_size to {MOST_SEQUENCES // (height * width)} at most, and accumulate batches if need be."
            )

    # -- looking at it ------------------------------------------------------------------------------------------

    def pipeline(self) -> StableVideoDiffusionPipeline:
        """The pipeline of the network as it is now."""
        pipeline = StableVideoDiffusionPipeline(
            unet=self.network, scheduler=self.scheduler, feature_extractor=self.processor, **self.frozen
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @override
    def pictures(self, batch: Batch) -> Tensor | None:
        clips = batch["frames"][: self.num_samples]
        if not self.num_samples:
            return None
        buckets, fps = motion_bucket(clips).tolist(), batch["fps"].tolist()
        pipeline, rows = self.pipeline(), []
        for number, clip in enumerate(clips):
            with drawn_from(number, clip.device):
                sample = pipeline(
                    to_pil(clip[0]),
                    height=clip.shape[-2],
                    width=clip.shape[-1],
                    num_frames=len(clip),
                    num_inference_steps=self.sample_steps,
                    fps=round(fps[number]),
                    motion_bucket_id=round(buckets[number]),
                    generator=torch.Generator().manual_seed(number),
                    output_type="pt",
                ).frames[0]
            rows += [clip, sample.to(clip)]
        return torch.stack(rows)
