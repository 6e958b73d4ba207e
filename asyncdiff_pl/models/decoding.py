"""Decoded frames as pictures: rounded on the device, so that a quarter of the bytes has to come to the CPU."""

from __future__ import annotations

import torch
from PIL import Image


def to_pictures(frames: torch.Tensor) -> list[Image.Image]:
    """Pictures of frames, to the bit as diffusers' image processors make them on the CPU.

    Args:
        frames: Values from 0 to 1, [frames, 3, height, width], in float32.

    Returns:
        One RGB picture for each frame.
    """
    pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]
