"""Pictures for CLIP: resized and normalised as the pipelines do it, and disturbed as generated pictures are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_as_svd(pictures: Tensor, size: int) -> Tensor:
    """Resizes pictures as `StableVideoDiffusionPipeline` does for its image tower.

    Smaller pictures are interpolated bicubically, corners on corners; larger ones are blurred before by a Gaussian of
    (factor − 1) / 2 pixels.

    Args:
        pictures: [B, 3, H, W].
        size: Height and width of the result, in pixels.
    """
    for dim in (-1, -2):
        factor = pictures.shape[dim] / size
        if factor > 1:
            sigma = (factor - 1) / 2
            pictures = _blur(pictures, torch.full((), sigma, device=pictures.device), max(int(4 * sigma), 3) // 2, dim)
    return F.interpolate(pictures, size=(size, size), mode="bicubic", align_corners=True)


def resize_as_processor(pictures: Tensor, size: int) -> Tensor:
    """Resizes square pictures as `CLIPProcessor` does: bicubic, antialiased where they shrink.

    Args:
        pictures: [B, 3, H, W].
        size: Height and width of the result, in pixels.
    """
    return F.interpolate(pictures, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def normalise(pictures: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels from 0 to 1 as CLIP takes them.

    Args:
        pictures: [B, 3, H, W], pixels from 0 to 1.
        mean: [3], of each colour.
        std: [3], of each colour.
    """
    return (pictures - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def disturb(pictures: Tensor) -> Tensor:
    """Disturbs most pictures a little, as an autoencoder and an imperfect denoiser do.

    Half of the pictures are blurred (0.3 to 1.2 pixels), half get noise (up to 0.06) in every pixel or in patches of 4,
    and all change brightness and contrast by up to 10 %. Colours and positions, which captions name, stay.

    Args:
        pictures: [B, 3, H, W], pixels from 0 to 1.

    Returns:
        The same shape and range.
    """
    number, device = len(pictures), pictures.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, 1, 1, 1, device=device)

    sigma = uniform(0.3, 1.2)
    blurred = _blur_each(pictures, sigma)
    pictures = torch.where(uniform(0, 1) < 0.5, blurred, pictures)
    fine = torch.randn_like(pictures)
    coarse = F.interpolate(torch.randn_like(pictures[..., ::4, ::4]), size=pictures.shape[-2:], mode="bilinear")
    noise = torch.where(uniform(0, 1) < 0.5, fine, coarse)
    pictures = pictures + noise * uniform(0, 0.06) * (uniform(0, 1) < 0.5)
    return ((pictures - 0.5) * uniform(0.9, 1.1) + 0.5 * uniform(0.9, 1.1)).clamp(0, 1)


def _kernel(sigma: Tensor, radius: int) -> Tensor:
    """Gaussian weights [..., 2 radius + 1] for widths [...]."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma[..., None] ** 2))
    return weights / weights.sum(-1, keepdim=True)


def _blur(pictures: Tensor, sigma: Tensor, radius: int, dim: int) -> Tensor:
    """Blurs all pictures [B, 3, H, W] by one width along one dimension, -1 or -2."""
    padding = [radius, radius, 0, 0] if dim == -1 else [0, 0, radius, radius]
    shape = (1, 1, 1, -1) if dim == -1 else (1, 1, -1, 1)
    weights = _kernel(sigma, radius).view(shape).to(pictures.dtype).expand(pictures.shape[1], -1, -1, -1)
    return F.conv2d(F.pad(pictures, padding, mode="reflect"), weights, groups=pictures.shape[1])


def _blur_each(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each picture by a width of its own: sums of shifted pictures, since convolutions share their weights."""
    weights = _kernel(sigma.flatten(), 2).to(pictures.dtype)
    for dim, padding in ((-1, [2, 2, 0, 0]), (-2, [0, 0, 2, 2])):
        windows = F.pad(pictures, padding, mode="replicate").unfold(dim, 5, 1)
        pictures = torch.einsum("bchwk,bk->bchw", windows, weights)
    return pictures
