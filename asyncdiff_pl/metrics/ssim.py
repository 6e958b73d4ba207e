"""How near pictures are to a reference in structure: SSIM (Wang et al. 2004), one number a sample."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

WINDOW = 11
"""Side in pixels of the Gaussian window (sigma 1.5) that statistics are taken in."""


def ssim(pictures: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each sample, the mean over its frames.

    Args:
        pictures: [B, 3, H, W] or [B, F, 3, H, W], floating point: pictures or clips, 11 pixels high and wide or more.
        reference: What they should be, of the same shape.
        data_range: Highest value less lowest: 1 for pixels from 0 to 1.

    Returns:
        [B], float32, from -1 to 1; 1 where a sample equals its reference.

    Raises:
        ValueError: The shapes differ, or the pictures are smaller than the window.
    """
    if pictures.shape != reference.shape or pictures.ndim not in (4, 5):
        raise ValueError(
            f"SSIM compares tensors [B, 3, H, W] or [B, F, 3, H, W] of one shape; given are {tuple(pictures.shape)} "
            f"and {tuple(reference.shape)}."
        )
    if min(pictures.shape[-2:]) < WINDOW:
        height, width = pictures.shape[-2:]
        raise ValueError(f"SSIM needs pictures of {WINDOW} x {WINDOW} pixels or more; given are {width} x {height}.")
    frames, references = (x.float().reshape(-1, *x.shape[-3:]) for x in (pictures, reference))
    found = structural_similarity_index_measure(frames, references, data_range=data_range, reduction="none")
    return found.reshape(len(pictures), -1).mean(1)
