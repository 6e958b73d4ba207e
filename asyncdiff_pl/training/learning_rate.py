"""The learning rate over a run: a linear warm-up, then half a cosine down to nothing (Loshchilov and Hutter, 2017).

Or it stays after the warm-up, as DDPM has it.
"""

from __future__ import annotations

import math


def warm_up_cosine(step: int, warm_up: int, total: int) -> float:
    """Factor of the learning rate at one step.

    Args:
        step: Number of the step, from 0.
        warm_up: Steps until the factor is 1.
        total: Steps of the whole run, at the end of which the factor is 0.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, total - warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warm_up_constant(step: int, warm_up: int) -> float:
    """Factor of the learning rate at one step, 1 after the warm-up.

    Args:
        step: Number of the step, from 0.
        warm_up: Steps until the factor is 1.
    """
    return min(1.0, (step + 1) / max(1, warm_up))
