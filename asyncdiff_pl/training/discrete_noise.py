"""Noise in discrete timesteps, as DDPM and Stable Diffusion have it: x_t = √ᾱ_t x + √(1 − ᾱ_t) n.

After Ho et al. (2020), "Denoising Diffusion Probabilistic Models", equation 4; v-prediction after Salimans and Ho
(2022), "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a network predicts: the noise, v = √ᾱ n − √(1 − ᾱ) x, or the clean data; diffusers' names."""


class DiscreteNoise:
    """Adds noise and says what the network should give.

    Args:
        alphas_cumprod: ᾱ [T], falling; a diffusers scheduler has it under this name.
        prediction_type: What the network predicts.

    Raises:
        ValueError: The prediction type is not known.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type is {prediction_type}; training knows {', '.join(get_args(PredictionType))}."
            )
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> DiscreteNoise:
        """The same on a device."""
        return DiscreteNoise(self.alphas_cumprod.to(device), self.prediction_type)

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy data x_t, of the shape of `clean` [B, ...], at timesteps [B]."""
        signal, spread = self._scales(clean, timesteps)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should give, of the shape of `clean` [B, ...]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        signal, spread = self._scales(clean, timesteps)
        return signal * noise - spread * clean

    def _scales(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[timesteps].view(-1, *[1] * (like.ndim - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()
