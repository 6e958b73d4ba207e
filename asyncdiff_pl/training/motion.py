"""How much a clip moves, as the number that Stable Video Diffusion is conditioned on: motion_bucket_id."""

from __future__ import annotations

from torch import Tensor

from asyncdiff_pl.metrics.motion import frame_difference

MEDIAN_DIFFERENCE = 0.015
"""Median over training scenes of the mean absolute difference between neighbouring frames, for pixels from 0 to 1."""


def motion_bucket(clips: Tensor) -> Tensor:
    """The motion_bucket_id of clips: 255 d / (d + m), at least 1, for d = mean |x₊ − x| and m = `MEDIAN_DIFFERENCE`.

    It rises with d: 127.5 at the median scene, 85 at half of its motion, 170 at twice, 255 at most.

    Args:
        clips: [B, F, 3, H, W], F from 2 up, pixels from 0 to 1.

    Returns:
        [B], from 1 to 255, not rounded.
    """
    difference = frame_difference(clips)
    return (255 * difference / (difference + MEDIAN_DIFFERENCE)).clamp(1, 255)
