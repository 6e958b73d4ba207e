"""How much a sample's loss counts at its noise level: evenly, by the signal-to-noise ratio, or as learned."""

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


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR = ᾱ / (1 − ᾱ) of noise levels of any shape, in float64."""
    alphas_cumprod = alphas_cumprod.to(torch.float64)
    return alphas_cumprod / (1 - alphas_cumprod)
