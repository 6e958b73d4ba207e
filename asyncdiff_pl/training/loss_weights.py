"""How much a sample's loss counts at its noise level: evenly, by the signal-to-noise ratio, or as learned.

The ratio is SNR = ᾱ / (1 − ᾱ). Each rule is given for errors of the noise; an error of v or of the clean data is
multiplied by SNR / (SNR + 1) or by SNR besides, which makes one of the noise of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType


class LossWeight(nn.Module):
    """Turns the losses of a batch's samples into what is averaged and made small.

    Its parameters, if it has any, are trained by the network's optimizer together with the network.
    """

    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        """Makes the buffers, once, before a checkpoint is loaded and before the weight moves to its device.

        Args:
            alphas_cumprod: ᾱ [T], falling.
            prediction_type: What the network predicts, and the losses are about.
        """

    def weight(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        """Weighted losses.

        Args:
            losses: [B], the mean square error of each sample's prediction, with gradient.
            timesteps: [B], int64.

        Returns:
            [B], of which the training loop takes the mean (times the weights of the timestep sampler).
        """
        raise NotImplementedError(f"{type(self).__name__} must say how losses are weighted.")


class UniformWeight(LossWeight):
    """Leaves losses as they are: DDPM's simple loss."""

    @override
    def weight(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        return losses


class _FixedWeight(LossWeight):
    """A weight for each timestep that does not change."""

    weights: Tensor

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        weights = self.at(signal_to_noise(alphas_cumprod), prediction_type)
        self.register_buffer("weights", weights.float(), persistent=False)

    def at(self, snr: Tensor, prediction_type: PredictionType) -> Tensor:
        """Weights at some signal-to-noise ratios [T], of the same shape."""
        raise NotImplementedError

    @override
    def weight(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        return losses * self.weights[timesteps]


class P2Weight(_FixedWeight):
    """Weights by 1 / (k + SNR)^γ, less where little noise is left to clean up.

    After Choi et al. (2022), "Perception Prioritized Training of Diffusion Models", equation 8.

    Args:
        gamma: γ, from 0 (no weight) up; the authors take 0.5 and 1.
        k: k, above 0.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        super().__init__()
        if gamma < 0 or k <= 0:
            raise ValueError(f"gamma is {gamma} and k {k}; give gamma from 0 up and k above 0.")
        self.gamma = gamma
        self.k = k

    @override
    def at(self, snr: Tensor, prediction_type: PredictionType) -> Tensor:
        return in_terms_of_noise(prediction_type, snr) / (self.k + snr) ** self.gamma


class MinSNRWeight(_FixedWeight):
    """Weights by min(SNR, γ) / SNR: the error of the clean data counts as SNR, but not above γ.

    After Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", equation 10.

    Args:
        gamma: γ, above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"gamma is {gamma}; give a signal-to-noise ratio above 0.")
        self.gamma = gamma

    @override
    def at(self, snr: Tensor, prediction_type: PredictionType) -> Tensor:
        # 1 where there is no signal, as at every ratio below γ
        share = torch.where(snr > self.gamma, self.gamma / snr, 1.0)
        return in_terms_of_noise(prediction_type, snr) * share


class LearnedUncertainty(LossWeight):
    """Weights by 1 / e^u and adds u, where u is learned for each noise level: ln of the loss at its optimum.

    So the losses of all noise levels count alike, relative to what is usual there. u is a linear map, 0 at first, of
    random Fourier features of ln σ / 4 = −ln SNR / 8. After Karras et al. (2024), "Analyzing and Improving the Training
    Dynamics of Diffusion Models", equation 22.

    Args:
        features: Number of Fourier features.
    """

    features: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}; give a number from 1 up.")
        self.uncertainty = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.uncertainty.weight)

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        # the same on all ranks and in all runs
        generator = torch.Generator().manual_seed(0)
        count = self.uncertainty.in_features
        frequencies, phases = torch.randn(count, generator=generator), torch.rand(count, generator=generator)
        level = -signal_to_noise(alphas_cumprod).clamp(min=torch.finfo(torch.float32).tiny).log() / 8
        turns = level[:, None] * frequencies + phases
        self.register_buffer("features", (2**0.5 * torch.cos(2 * torch.pi * turns)).float(), persistent=False)

    @override
    def weight(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        with torch.autocast(losses.device.type, enabled=False):
            uncertainty = self.uncertainty(self.features[timesteps])[:, 0]
            return losses.float() / uncertainty.exp() + uncertainty


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR = ᾱ / (1 − ᾱ) at some timesteps, of their shape, in float64."""
    alphas_cumprod = alphas_cumprod.double()
    return alphas_cumprod / (1 - alphas_cumprod)


def in_terms_of_noise(prediction_type: PredictionType, snr: Tensor) -> Tensor:
    """By how much the square error of a prediction is multiplied to be that of the noise, at some SNR.

    Args:
        prediction_type: What is predicted.
        snr: Signal-to-noise ratios of any shape.
    """
    if prediction_type == "epsilon":
        return torch.ones_like(snr)
    return snr / (snr + 1) if prediction_type == "v_prediction" else snr
