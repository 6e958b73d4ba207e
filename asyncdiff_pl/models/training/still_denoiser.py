"""What training the denoisers of single pictures has in common: discrete noise on latents of the first frame."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.training.autoencoder import encode
from asyncdiff_pl.models.training.base import Batch, NetworkTraining, drawn_from
from asyncdiff_pl.models.training.components import frozen_network, read_scheduler
from asyncdiff_pl.training.discrete_noise import DiscreteNoise
from asyncdiff_pl.training.timesteps import UniformTimesteps

VALIDATION_TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Where the loss is measured, as shares of all timesteps."""


class StillDenoiserTraining(NetworkTraining):
    """Trains a denoiser of single pictures; a subclass says what it is conditioned on, and how its pipeline is called.

    Args:
        network: The denoiser.
        autoencoder: A trained autoencoder: a folder as exported, or the name of a component.
        scheduler: The pipeline whose scheduler is used: an embedded one, or a folder.
        drop_condition: Share of pictures that are trained without what they are conditioned on, for guidance.
        sample_steps: Denoising steps of the pictures that are drawn in validation.
        num_samples: Number of pictures that are drawn in validation; 0 for none.
        guidance_scale: Guidance of the pictures that are drawn in validation.
        settings: Those of `NetworkTraining`.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: str,
        scheduler: str,
        drop_condition: float,
        sample_steps: int,
        num_samples: int,
        guidance_scale: float,
        **settings: Any,
    ) -> None:
        super().__init__(network, **settings)
        self.autoencoder_folder = find_component(autoencoder)
        self.scheduler = read_scheduler(scheduler)
        self.noise = DiscreteNoise(self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type)
        self.timesteps = UniformTimesteps(spread=True)
        self.timesteps.build(self.scheduler.alphas_cumprod)
        self.drop_condition = drop_condition
        self.sample_steps = sample_steps
        self.num_samples = num_samples
        self.guidance_scale = guidance_scale

    def condition(self, batch: Batch, dropped: Tensor) -> Any:
        """What the network is conditioned on.

        Args:
            batch: The pictures.
            dropped: [B], bool: which are trained without it.
        """
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """Calls the network on latents [B, C, h, w] at timesteps [B]."""
        raise NotImplementedError

    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Pictures [N, 3, H, W] from 0 to 1 that the pipeline makes of some conditions of the batch."""
        raise NotImplementedError

    @override
    def load_frozen(self) -> dict[str, nn.Module]:
        return {"vae": frozen_network(AutoencoderKL, str(self.autoencoder_folder))}

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.noise = self.noise.to(self.device)

    @torch.no_grad()
    def picture_latents(self, pictures: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of pictures [B, 3, H, W] from 0 to 1."""
        vae: Any = self.frozen["vae"]
        return encode(vae, pictures) * vae.config.scaling_factor

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        number, device = len(batch["frames"]), batch["frames"].device
        dropped = torch.rand(number, device=device) < self.drop_condition
        timesteps, _ = self.timesteps.draw(batch["frames"])
        return {"loss": self._losses(batch, timesteps, dropped).mean()}

    @override
    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        size, device = len(batch["frames"]), batch["frames"].device
        found = {}
        for share in VALIDATION_TIMES:
            with drawn_from(number, device):
                timesteps = torch.full((size,), int(share * len(self.noise)), device=device)
                losses = self._losses(batch, timesteps, torch.zeros(size, dtype=torch.bool, device=device))
                found[f"loss_at_{share}"] = losses.mean()
        return {"loss": torch.stack([*found.values()]).mean(), **found}

    def _losses(self, batch: Batch, timesteps: Tensor, dropped: Tensor) -> Tensor:
        """The loss of each picture [B]."""
        latents = self._once(batch["frames"], lambda frames: self.picture_latents(frames[:, 0]))
        noise = torch.randn_like(latents)
        noisy = self.noise.add(latents, noise, timesteps)
        output = self.predict(noisy, timesteps, self.condition(batch, dropped))
        target = self.noise.target(latents, noise, timesteps)
        return F.mse_loss(output.float(), target, reduction="none").flatten(1).mean(1)

    @override
    def pictures(self, batch: Batch) -> Tensor | None:
        if not self.num_samples:
            return None
        # a batch has its own number too, which is no list
        first = {name: value[: self.num_samples] for name, value in batch.items() if name != "number"}
        with drawn_from(0, self.device):
            made = self.sample(first, torch.Generator().manual_seed(0))
        return torch.stack([first["frames"][:, 0], made.to(first["frames"])])
