"""How near pictures are to a reference, pixel by pixel: the peak signal-to-noise ratio, one number a sample."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio


def psnr(pictures: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample: 10 log10(data_range² / mean squared error), in dB.

    The error is averaged over all that belongs to a sample, so a clip has one ratio, not one a frame.

    Args:
        pictures: [B, ...], floating point: pictures or clips.
        reference: What they should be, of the same shape.
        data_range: Highest value less lowest: 1 for pixels from 0 to 1.

    Returns:
        [B], float32; infinite where a sample equals its reference.

    Raises:
        ValueError: The shapes differ, or there are no pixels.
    """
    if pictures.shape != reference.shape or pictures.ndim < 2:
        raise ValueError(
            f"PSNR compares tensors [B, ...] of one shape; given are {tuple(pictures.shape)} and "
            f"{tuple(reference.shape)}."
        )
    return peak_signal_noise_ratio(
        pictures.flatten(1).float(), reference.flatten(1).float(), data_range=data_range, reduction="none", dim=1
    )
