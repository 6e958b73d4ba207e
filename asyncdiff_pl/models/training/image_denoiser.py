"""Trains the denoiser of Stable Diffusion: a caption gives a picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from typing_extensions import override

from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.training.base import Batch
from asyncdiff_pl.models.training.components import frozen_network, new_network
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.still_denoiser import StillDenoiserTraining
from asyncdiff_pl.models.training.tokens import Tokenize


class ImageDenoiserTraining(StillDenoiserTraining):
    """Trains the network of `StableDiffusionPipeline` for first frames, by their captions.

    Args:
        architecture: A folder with the config.json of a `UNet2DConditionModel`, or the name of a component of the
            package.
        autoencoder: A trained autoencoder: a folder as exported, or the name of a component.
        clip: A trained CLIP model with its tokenizer: a folder as exported, or the name of a component.
        scheduler: The pipeline whose scheduler is used, for noise and for samples: an embedded one, or a folder.
        drop_condition: Share of pictures that are trained with an empty caption, for guidance.
        sample_steps: Denoising steps of the pictures that are drawn in validation.
        num_samples: Number of pictures that are drawn in validation; 0 for none.
        guidance_scale: Guidance of the pictures that are drawn in validation.
        optimizer: How the weights follow the gradients.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported, or the name of a component; null draws new ones.
        capture: Record the network's forward and backward pass as CUDA graphs: several times faster steps on a GPU.
    """

    def __init__(
        self,
        architecture: str = "sd-unet",
        autoencoder: str = "scene-image-autoencoder",
        clip: str = "scene-clip",
        scheduler: str = "tiny-sd",
        drop_condition: float = 0.1,
        sample_steps: int = 20,
        num_samples: int = 8,
        guidance_scale: float = 5.0,
        optimizer: Optimizer = Optimizer(),
        compile: bool = False,
        start_from: str | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__(
            new_network(UNet2DConditionModel, architecture),
            autoencoder,
            scheduler,
            drop_condition,
            sample_steps,
            num_samples,
            guidance_scale,
            optimizer=optimizer,
            compile=compile,
            start_from=start_from,
            capture=capture,
        )
        self.clip_folder = find_component(clip)
        self.tokenizer = CLIPTokenizer.from_pretrained(self.clip_folder)
        context = self.tokenizer.model_max_length
        self.tokenize = Tokenize(self.tokenizer, context, multiple=context)
        self.register_buffer("empty", self.tokenize([""], [])[0], persistent=False)

    @override
    def load_frozen(self) -> dict[str, nn.Module]:
        return {**super().load_frozen(), "text_encoder": frozen_network(CLIPTextModel, str(self.clip_folder))}

    @torch.no_grad()
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What the network looks at, [B, L, D], of tokens [B, L] padded to the whole context."""
        encoder: Any = self.frozen["text_encoder"]
        return encoder(input_ids=tokens).last_hidden_state.float()

    @override
    def condition(self, batch: Batch, dropped: Tensor) -> Tensor:
        tokens, _ = self._tokens(batch)
        return self.embed_tokens(torch.where(dropped[:, None], self.empty, tokens))

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.call_network(sample=noisy, timestep=timesteps, encoder_hidden_states=condition)

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline of the network as it is now."""
        pipeline = StableDiffusionPipeline(
            unet=self.network,
            scheduler=self.scheduler,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **self.frozen,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @override
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        height, width = batch["frames"].shape[-2:]
        return self.pipeline()(
            batch["captions"],
            height=height,
            width=width,
            num_inference_steps=self.sample_steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="pt",
        ).images
