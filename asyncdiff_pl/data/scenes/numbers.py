"""Uniform numbers that depend on nothing but a split, a scene's index and a slot: the same everywhere.

The generator is splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014) used as a
counter-based hash, in torch's 64-bit integers, whose products wrap around on CPUs and GPUs alike.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Split = Literal["train", "validation", "test", "demo"]
SPLITS: tuple[str, ...] = get_args(Split)


def _signed(value: int) -> int:
    """The lower 64 bits as the signed number that torch's int64 takes."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shifts right without copying the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """Scrambles 64-bit integers: splitmix64's output function.

    Args:
        value: Any shape, int64.

    Returns:
        The same shape, int64, over the whole range.
    """
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


class Numbers:
    """Random numbers of a batch of scenes, drawn slot after slot.

    Args:
        index: The scenes' indices, int64, shape (B,).
        split: The split that they belong to; splits have numbers of their own.

    Raises:
        ValueError: The split is unknown.
    """

    def __init__(self, index: Tensor, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; give one of {', '.join(SPLITS)}.")
        self._key = mix(mix(index + _signed((SPLITS.index(split) + 1) * _STEP)) + _STEP)
        self._slot = 0

    def bits(self, *shape: int) -> Tensor:
        """Integers from 0 to 2**31 - 1, shape (B, *shape); each call takes slots that no other call takes."""
        count = 1
        for length in shape:
            count *= length
        slots = torch.arange(self._slot + 1, self._slot + count + 1, device=self._key.device)
        self._slot += count
        mixed = mix(self._key[:, None] + slots * _STEP)
        return _shift(mixed, 33).reshape(len(self._key), *shape)

    def choice(self, number: int, *shape: int) -> Tensor:
        """Integers from 0 to `number` - 1, int64, shape (B, *shape)."""
        return self.bits(*shape) % number

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers from `low` to `high`, float32, shape (B, *shape)."""
        # 24 bits are what a float32 holds, so the fraction is exact
        return low + (high - low) * ((self.bits(*shape) >> 7).float() * 2.0**-24)
