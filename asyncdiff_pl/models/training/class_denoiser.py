"""Trains a diffusion transformer: a class gives a picture."""

from __future__ import annotations

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.models.training.base import Batch
from asyncdiff_pl.models.training.components import new_network
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.still_denoiser import StillDenoiserTraining

NULL_CLASS = 1000
"""The class that stands for none in guidance: `DiTPipeline` has no other."""


class ClassDenoiserTraining(StillDenoiserTraining):
    """Trains the network of `DiTPipeline` for first frames, by the class of the scene.

    Args:
        architecture: A folder with the config.json of a `DiTTransformer2DModel` with 1,000 classes, as its pipeline has
            it, or the name of a component of the package.
        autoencoder: A trained autoencoder: a folder as exported, or the name of a component.
        scheduler: The pipeline whose scheduler is used, for noise and for samples: an embedded one, or a folder.
        drop_condition: Share of pictures that are trained without their class, for guidance.
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
        architecture: str = "dit-transformer",
        autoencoder: str = "scene-image-autoencoder",
        scheduler: str = "tiny-dit",
        drop_condition: float = 0.1,
        sample_steps: int = 20,
        num_samples: int = 8,
        guidance_scale: float = 4.0,
        optimizer: Optimizer = Optimizer(weight_decay=0.0),
        compile: bool = False,
        start_from: str | None = None,
        capture: bool = False,
    ) -> None:
        network = new_network(DiTTransformer2DModel, architecture)
        classes = network.config.num_embeds_ada_norm
        if classes != NULL_CLASS:
            raise ValueError(
                f"{architecture} has num_embeds_ada_norm {classes}; set {NULL_CLASS}, the class that `DiTPipeline` "
                "takes for none."
            )
        initialise(network)
        super().__init__(
            network,
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
        for part in network.modules():
            if isinstance(part, LabelEmbedding):
                # each block would drop classes by itself, so that the network would never see a picture without any
                part.dropout_prob = 0.0

    @override
    def condition(self, batch: Batch, dropped: Tensor) -> Tensor:
        return torch.where(dropped, NULL_CLASS, batch["label"])

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.call_network(hidden_states=noisy, timestep=timesteps, class_labels=condition)

    def pipeline(self) -> DiTPipeline:
        """The pipeline of the network as it is now."""
        pipeline = DiTPipeline(transformer=self.network, vae=self.frozen["vae"], scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @override
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        made = self.pipeline()(
            batch["label"].tolist(),
            num_inference_steps=self.sample_steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="np",
        ).images
        return torch.from_numpy(made).permute(0, 3, 1, 2)


def initialise(network: DiTTransformer2DModel) -> None:
    """Draws the weights of a diffusion transformer so that each of its blocks begins by changing nothing.

    diffusers leaves torch's own initial weights, with which training soon or late diverges.

    Args:
        network: What is to be trained.

    Source: Peebles & Xie (2023), "Scalable Diffusion Models with Transformers", section 3.2, "adaLN-Zero block".
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in network.transformer_blocks:
        for layer in (block.norm1.emb.timestep_embedder.linear_1, block.norm1.emb.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(layer.weight)
