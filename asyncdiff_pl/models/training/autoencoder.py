"""Trains the autoencoder of a pipeline: pictures to latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor
from typing_extensions import override

from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.sources import read_json
from asyncdiff_pl.models.training.base import Batch, NetworkTraining
from asyncdiff_pl.models.training.components import new_network
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.training.reconstruction import gradient_loss, normal_divergence, pixel_loss

ENCODE_AT_ONCE = 256
"""Pictures that are encoded in one call."""


class AutoencoderTraining(NetworkTraining):
    """Trains an autoencoder on pixels, edges and a slight pull of the latents to a normal distribution.

    What is exported has the `scaling_factor` that gives latents unit variance, measured at the end.

    Args:
        architecture: A folder with the config.json of an `AutoencoderKL` or an `AutoencoderKLTemporalDecoder`, or the
            name of a component of the package (`scene-video-autoencoder`, `scene-image-autoencoder`).
        edge_weight: Weight of the error of differences between neighbouring pixels, beside 1 for that of pixels.
        divergence_weight: Weight of the latents' divergence from a normal distribution, in nats a number.
        optimizer: How the weights follow the gradients.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported, or the name of a component; null draws new ones. An
            autoencoder of videos takes those of one of pictures, too.
        freeze_encoder: Train the decoder alone: latents stay what they are in `start_from`, and with them the denoisers
            that were trained on them.
    """

    def __init__(
        self,
        architecture: str = "scene-video-autoencoder",
        edge_weight: float = 0.5,
        divergence_weight: float = 1e-6,
        optimizer: Optimizer = Optimizer(weight_decay=1e-4, warm_up=200),
        compile: bool = False,
        start_from: str | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        if freeze_encoder and start_from is None:
            raise ValueError("freeze_encoder needs a trained encoder; set start_from to the folder of its autoencoder.")
        kind = read_json(find_component(architecture), "config.json", "a network's folder").get("_class_name")
        model_class = AutoencoderKLTemporalDecoder if kind == "AutoencoderKLTemporalDecoder" else AutoencoderKL
        network = new_network(model_class, architecture)
        super().__init__(network, optimizer, compile, start_from)
        if model_class is AutoencoderKLTemporalDecoder and network.config.layers_per_block == 1:
            # diffusers' middle block has this attention and does not run it; DDP would wait for its gradient
            network.decoder.mid_block.attentions.requires_grad_(False)
        if freeze_encoder and start_from is not None:
            config = read_json(find_component(start_from), "config.json", "a network's folder")
            network.register_to_config(scaling_factor=config["scaling_factor"])
            network.encoder.requires_grad_(False)
            if network.quant_conv is not None:
                network.quant_conv.requires_grad_(False)
        self.freeze_encoder = freeze_encoder
        self.edge_weight = edge_weight
        self.divergence_weight = divergence_weight
        self._latest: Tensor | None = None

    def round_trip(self, clips: Tensor, draw: bool) -> tuple[Tensor, Any]:
        """Encodes and decodes.

        Args:
            clips: [B, F, 3, H, W], pixels from 0 to 1.
            draw: Draw the latents from their distribution; otherwise its mode is taken, as pipelines do.

        Returns:
            Clips of the same shape, pixels from −1 to 1, and the distribution of the latents.
        """
        distribution = self.network.encode(clips.flatten(0, 1) * 2 - 1).latent_dist
        latents = distribution.sample() if draw else distribution.mode()
        return decode(self.network, latents, clips.shape[1]).unflatten(0, clips.shape[:2]), distribution

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        clips = batch["frames"]
        decoded, distribution = self.round_trip(clips, draw=True)
        reference = clips * 2 - 1
        pixels, edges = pixel_loss(decoded, reference), gradient_loss(decoded, reference)
        divergence = normal_divergence(distribution.mean.float(), distribution.logvar.float())
        self._latest = clips
        loss = pixels + self.edge_weight * edges + self.divergence_weight * divergence
        return {"loss": loss, "pixels": pixels, "edges": edges, "divergence": divergence}

    @override
    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        decoded = (self.round_trip(batch["frames"], draw=False)[0] / 2 + 0.5).clamp(0, 1)
        return {"psnr": psnr(decoded.flatten(0, 1), batch["frames"].flatten(0, 1)).mean()}

    @override
    def pictures(self, batch: Batch) -> Tensor:
        clips = batch["frames"][:4]
        decoded = self.round_trip(clips, draw=False)[0] / 2 + 0.5
        return torch.stack([clips, decoded], dim=1).flatten(0, 1)

    @override
    def export(self, folder: Path) -> None:
        if not self.freeze_encoder:
            assert self._latest is not None
            with torch.no_grad():
                latents = encode(self.network, self._latest.flatten(0, 1)[:ENCODE_AT_ONCE])
            self.network.register_to_config(scaling_factor=round(1 / float(latents.float().std()), 5))
        super().export(folder)


def encode(autoencoder: Any, pictures: Tensor) -> Tensor:
    """Latents of pictures as pipelines have them: the mode of their distribution, not scaled.

    Args:
        autoencoder: An autoencoder of diffusers.
        pictures: [N, 3, H, W], pixels from 0 to 1; they are encoded `ENCODE_AT_ONCE` at a time.

    Returns:
        [N, C, h, w], float32.
    """
    parts = [autoencoder.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(ENCODE_AT_ONCE)]
    # where networks run in 16 bits, noise is added in 32
    return torch.cat(parts).float()


def decode(autoencoder: Any, latents: Tensor, num_frames: int) -> Tensor:
    """Pictures of latents.

    Args:
        autoencoder: An autoencoder of diffusers; one for videos looks over neighbouring frames.
        latents: [N, C, h, w], not scaled, those of each clip in order.
        num_frames: Frames of a clip.

    Returns:
        [N, 3, H, W], pixels from −1 to 1.
    """
    if isinstance(autoencoder, AutoencoderKLTemporalDecoder):
        return autoencoder.decode(latents, num_frames=num_frames).sample
    return autoencoder.decode(latents).sample
