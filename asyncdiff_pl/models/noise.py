"""Noise that follows from the run's seed and the sample alone, whatever rank makes it and whatever is beside it."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def sample_seed(seed: int, sample_id: str) -> int:
    """Seed of one sample's noise: from the run's seed and the sample's id alone, so not from rank or order."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _SeededStep:
    """A scheduler's `step` that draws each sample's noise from its own generator."""

    def __init__(self, step: Callable[..., Any], generators: Sequence[torch.Generator]) -> None:
        self._step = step
        self._generators = generators
        self._signature = inspect.signature(step)
        # pipelines look at the arguments that a scheduler's step takes
        functools.update_wrapper(self, step, updated=())  # not its attributes: `_step` would be overwritten

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs).arguments
        if bound.get("generator") is None and "sample" in bound:
            # DiT steps both halves of the guidance batch
            repeated = [*self._generators] * (bound["sample"].shape[0] // len(self._generators))
            kwargs["generator"] = repeated if len(repeated) > 1 else repeated[0]
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # the copy of a scheduler steps itself
        return copy.deepcopy(self._step, memo)


@contextmanager
def noise_from(scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Lets a stochastic scheduler draw each sample's noise from its own generator.

    Some pipelines (SVD's, DiT's) hand their scheduler none: it would draw from the global state, the same for a whole
    batch, so that a picture would depend on those beside it.

    Args:
        scheduler: Its `step` is another one within the context.
        generators: One a sample.
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    own = vars(scheduler).get("step")
    scheduler.step = seeded = _SeededStep(scheduler.step, generators)
    try:
        yield
    finally:
        # unless somebody wrapped it meanwhile
        if vars(scheduler).get("step") is seeded:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own
