"""Normal noise that is a function of a seed and of places in it, for a whole batch of seeds at once.

A picture's noise must not depend on those beside it in the batch, and drawing it from a generator for each picture
takes a call for each picture in each step, on the CPU. A counter-based generator needs neither: Philox4x32-10 of Salmon
et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3", turns (key, counter) into four words of 32 bits; here the
key is the picture's seed, and the counter says which draw and which four numbers of it. All seeds, counters and rounds
are tensor operations, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: Four words of 32 bits, least significant first; int64 tensors of shapes that fit.
        key: Two words, likewise.

    Returns:
        Four words, int64 tensors from 0 to 2³² − 1.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        # products wrap around at 64 bits, and the sign's copies that the shift brings in are masked off
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32) & _WORD ^ b ^ low,
            second & _WORD,
            (first >> 32) & _WORD ^ d ^ high,
            first & _WORD,
        )
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def seeded_normal(seeds: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers of each seed: the same for the same seed and draw, whatever the other seeds are.

    Args:
        seeds: [B], int64.
        draw: Number of the draw from 0; each has numbers of its own.
        shape: Shape of one seed's numbers.

    Returns:
        [B, *shape], float32, on the device of `seeds`. Devices differ in the last bits at most.
    """
    number = math.prod(shape)
    quads = -(-number // 4)
    place = torch.arange(quads, device=seeds.device)
    zero = torch.zeros_like(place)
    key = (seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]
    words = torch.stack(philox((place, zero + draw, zero, zero), key), dim=-1)
    # 24 bits, which float32 holds, from the middle of the first of 2²⁴ parts of (0, 1) on: the logarithm is finite
    uniform = ((words >> 8).float() + 0.5) * 2**-24
    # Box and Muller's transformation
    radius = (-2 * uniform[..., :2].log()).sqrt()
    angle = 2 * math.pi * uniform[..., 2:]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.flatten(1)[:, :number].unflatten(1, tuple(shape))
