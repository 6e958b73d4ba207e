"""How near the frames of a sample are to those of a reference: all numbers of one pair at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asyncdiff_pl.metrics.lpips import LPIPS
from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.metrics.ssim import ssim

BATCH = 8
"""Frames that LPIPS compares at once."""


def compare_frames(
    frames: Sequence[Image.Image],
    reference: Sequence[Image.Image],
    with_ssim: bool = True,
    lpips: LPIPS | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compares the frames of one sample with those of a reference.

    Args:
        frames: Pictures of one size.
        reference: As many of the same size.
        with_ssim: Whether SSIM is taken as well.
        lpips: The network of LPIPS, on `device`; None leaves LPIPS out.
        device: Where it is computed.

    Returns:
        `equal` (1 if all pixels are the same, else 0), `psnr_db` (infinite if they are), and `ssim` and `lpips` (means
        over the frames) if asked for.

    Raises:
        ValueError: Number or size of the frames differ, or the frames are too small.
    """
    shapes = [{(len(part), *frame.size) for frame in part} for part in (frames, reference)]
    if shapes[0] != shapes[1]:
        texts = [", ".join(f"{number} of {width}x{height}" for number, width, height in part) for part in shapes]
        raise ValueError(f"The frames are {texts[0]}, those of the reference {texts[1]}; give frames of one size.")
    pictures, references = (to_bytes(part).to(device) for part in (frames, reference))
    found = {"equal": float(torch.equal(pictures, references))}
    first, second = pictures / 255, references / 255
    found["psnr_db"] = psnr(first[None], second[None]).item()
    if with_ssim:
        found["ssim"] = ssim(first[None], second[None]).item()
    if lpips is not None:
        parts = [lpips(*pair) for pair in zip(first.split(BATCH), second.split(BATCH), strict=True)]
        found["lpips"] = torch.cat(parts).mean().item()
    return found


def to_bytes(frames: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as [N, 3, H, W], uint8."""
    return torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in frames])).permute(0, 3, 1, 2)
