"""How much a clip moves, and whether that is motion or flicker: differences of neighbouring frames."""

from __future__ import annotations

from torch import Tensor


def frame_difference(clips: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring frames, mean |x₊ − x|, of each clip.

    Args:
        clips: [B, F, ...], F from 2 up: pixels of any range.

    Returns:
        [B], in units of the pixels.

    Raises:
        ValueError: There are fewer than 2 frames.
    """
    _check(clips, 2, "a difference of neighbouring frames")
    return clips.diff(dim=1).abs().flatten(1).mean(1)


def second_difference(clips: Tensor) -> Tensor:
    """Mean absolute second difference over time, mean |x₊ − 2x + x₋|, of each clip.

    Args:
        clips: [B, F, ...], F from 3 up: pixels of any range.

    Returns:
        [B], in units of the pixels.

    Raises:
        ValueError: There are fewer than 3 frames.
    """
    _check(clips, 3, "a second difference over time")
    return clips.diff(n=2, dim=1).abs().flatten(1).mean(1)


def flicker(clips: Tensor) -> Tensor:
    """Ratio of second to first differences over all clips: mean |x₊ − 2x + x₋| / mean |x₊ − x|.

    An even change over time has 0, independent noise in each frame about 1.7, and frames that alternate between two
    pictures have 2. The means are taken over all clips before they are divided, so that clips that stand still do not
    count.

    Args:
        clips: [B, F, ...], F from 3 up: pixels of any range.

    Returns:
        A scalar from 0 to 2; not a number if nothing changes at all.

    Raises:
        ValueError: There are fewer than 3 frames.
    """
    return second_difference(clips).mean() / frame_difference(clips).mean()


def _check(clips: Tensor, frames: int, what: str) -> None:
    if clips.ndim < 2 or clips.shape[1] < frames:
        raise ValueError(f"{what} needs clips [B, F, ...] of {frames} or more frames; given is {tuple(clips.shape)}.")
