"""The loss of an autoencoder: how far pixels and edges are off, and how far latents are from a normal distribution."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def pixel_loss(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute plus mean square error: the first keeps edges sharp, the second is what PSNR measures.

    Args:
        pictures: Any shape, pixels from −1 to 1.
        reference: What they should be, of the same shape.
    """
    return F.l1_loss(pictures, reference) + F.mse_loss(pictures, reference)


def gradient_loss(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, over rows and columns.

    Args:
        pictures: [..., H, W].
        reference: What they should be, of the same shape.
    """
    error = pictures - reference
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of latents from the standard normal distribution, a mean over all numbers, in nats.

    Args:
        mean: Means of the latents.
        log_variance: Logarithms of their variances, of the same shape.
    """
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
