"""The variational bound of DDPMs, timestep by timestep, and variances that the network learns.

After Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", equations 3 to 7 and 13 to 16: a
timestep's term is the KL divergence of the model's step from the posterior q(x_{t-1} | x_t, x_0), and at the first
timestep the negative logarithm of the pictures' likelihood, of which each of 256 values is a part of the line.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType
from asyncdiff_pl.training.noise_schedule import signal_levels

TrainedVariance = Literal["fixed_small", "fixed_large", "learned_range"]
"""The variance of a step: that of the posterior β̃, β itself, or between both as the network says; diffusers' names."""

HALF_VALUE = 1 / 255
"""Half of the distance between two values of a pixel, from −1 to 1."""

LEAST_LIKELIHOOD = 1e-12


class VariationalBound(nn.Module):
    """The terms of the variational bound at single timesteps.

    Args:
        variances: β [T].
        prediction_type: What the network predicts.
        variance: Variance of the model's steps.
    """

    deviations: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, variances: Tensor, prediction_type: PredictionType, variance: TrainedVariance) -> None:
        super().__init__()
        self.is_learned = variance == "learned_range"
        variances = variances.double()
        levels = signal_levels(variances)
        before = F.pad(levels, (1, 0), value=1.0)[:-1]
        posterior = (1 - before) / (1 - levels) * variances
        # the first step's is 0, which has no logarithm; it takes the next one's, as the authors have it
        posterior[0] = posterior[1]
        of_clean = before.sqrt() * variances / (1 - levels)
        # the estimate of the clean data is linear in the prediction: so far a unit of error moves the step's mean
        slopes = {"epsilon": -((1 - levels) / levels).sqrt(), "v_prediction": -(1 - levels).sqrt()}
        self.register_buffer("deviations", (of_clean * slopes.get(prediction_type, 1.0)).float(), persistent=False)
        self.register_buffer("low", posterior.log().float(), persistent=False)
        high = torch.cat([posterior[:1], variances[1:]]) if variance == "fixed_large" else variances
        self.register_buffer("high", high.log().float(), persistent=False)
        self.is_low = variance == "fixed_small"

    @override
    def forward(self, clean: Tensor, errors: Tensor, timesteps: Tensor, shares: Tensor | None = None) -> Tensor:
        """Terms of the bound, in bits a dimension, [B].

        Args:
            clean: [B, C, H, W], from −1 to 1, of 256 values.
            errors: The network's prediction less what it should be, of the same shape, float32.
            timesteps: [B], int64.
            shares: Where each variance lies between β̃ (−1) and β (1), evenly in the logarithm, of the same shape; for
                a learned variance alone.
        """
        assert (shares is not None) == self.is_learned
        low, high, slopes = (
            table[timesteps].view(-1, *[1] * (clean.ndim - 1)) for table in (self.low, self.high, self.deviations)
        )
        share = (shares + 1) / 2 if shares is not None else 0.0 if self.is_low else 1.0
        log_variance = low + share * (high - low)
        deviation = slopes * errors
        wider = log_variance - low
        divergence = (wider + (-wider).exp() - 1 + deviation.square() * (-log_variance).exp()) / 2
        # the posterior's mean at the first timestep is the clean data
        first = negative_log_likelihood(clean, clean + deviation, log_variance)
        is_first = (timesteps == 0).view_as(low)
        return torch.where(is_first, first, divergence).flatten(1).mean(1) / math.log(2)


def negative_log_likelihood(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of each value under a normal distribution that is cut into 256 parts, in nats.

    After Ho et al. (2020), "Denoising Diffusion Probabilistic Models", equation 13.

    Args:
        clean: Values from −1 to 1, of 256; the first and the last one's parts are open.
        mean: Of the same shape.
        log_variance: Of a shape that fits.
    """
    precision = (-log_variance / 2).exp()
    offset = clean - mean
    below = torch.special.ndtr((offset + HALF_VALUE) * precision).where(clean < 1 - HALF_VALUE, 1.0)
    above = torch.special.ndtr((offset - HALF_VALUE) * precision).where(clean > HALF_VALUE - 1, 0.0)
    return -(below - above).clamp(min=LEAST_LIKELIHOOD).log()
