"""A scheduler's twin: a copy that runs ahead of it, with one noise estimate for all steps.

The twin has everything that the scheduler keeps (histories of multistep methods, its place among the timesteps), and
generators that draw what the scheduler's own will draw. So it foresees the noise of stochastic schedulers, and leaves
no trace: neither in the scheduler, which never holds a guess, nor in the generators.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from asyncdiff_pl.parallel.trajectory import Around

_ROLES = ("model_output", "timestep", "sample")
"""Arguments of `scheduler.step` that are known."""


@dataclass(frozen=True)
class StepCall:
    """A call of `scheduler.step` that a pipeline made.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arguments_of(self, scheduler: Any) -> dict[str, Any]:
        """The arguments by name.

        Args:
            scheduler: Whose step was called.

        Raises:
            ValueError: The step needs more than an estimate, a timestep and latents.
        """
        bound = _signature(type(scheduler).step).bind(scheduler, *self.args, **self.kwargs).arguments
        named = dict(list(bound.items())[1:])
        missing = [role for role in _ROLES if role not in named]
        further = [name for name, value in named.items() if name not in _ROLES and _has_tensors(value)]
        if missing or further:
            what = f"takes no {missing[0]}" if missing else f"is given a tensor {further[0]!r} beside its latents"
            raise ValueError(
                f"Step parallelism foresees latents with a copy of the scheduler, and the step of "
                f"{type(scheduler).__name__} {what}: take another scheduler, or stages or cfg."
            )
        return named


class Twin:
    """Runs ahead of a scheduler.

    Args:
        scheduler: Where a pipeline stands with it, before a step; it stays as it is.
        around: Makes the context in which a scheduler steps.

    Raises:
        ValueError: The scheduler cannot be copied.
    """

    def __init__(self, scheduler: Any, around: Around) -> None:
        self._around = around
        try:
            self._scheduler = copy.deepcopy(scheduler)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"Step parallelism foresees latents with a copy of the scheduler, and {type(scheduler).__name__} "
                f"cannot be copied ({error}): take another scheduler, or stages or cfg."
            ) from error

    def scaled(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Latents as a denoiser is given them.

        Args:
            latents: The latents.
            timestep: Their timestep.
        """
        scale = getattr(self._scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def foresee(self, latents: torch.Tensor, timesteps: Sequence[torch.Tensor], last: StepCall) -> torch.Tensor:
        """Steps ahead with one estimate, once.

        Args:
            latents: Where the pipeline stands.
            timesteps: The timestep there, and those of the steps that follow.
            last: A call of the scheduler's step with the estimate.

        Returns:
            What the latents would be at the last of the timesteps, scaled.
        """
        named = last.arguments_of(self._scheduler)
        named = with_cloned_generators(named)
        devices = [latents.device] if latents.device.type == "cuda" else []
        scaled = self.scaled(latents, timesteps[0])
        # where there is no generator the noise is of the process's own, and stays to be drawn
        with torch.random.fork_rng(devices=devices):
            for now, then in itertools.pairwise(timesteps):
                named |= {"timestep": now, "sample": latents}
                with self._around((), named):
                    # not its own attribute, which may be a wrapper that steps the scheduler itself
                    output = type(self._scheduler).step(self._scheduler, **named)
                latents = first_tensor(output)
                scaled = self.scaled(latents, then)
        return scaled


def first_tensor(output: Any) -> torch.Tensor:
    """The latents in what a scheduler's step returned."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def with_cloned_generators(tree: Any) -> Any:
    """The same, with copies of its generators: one that is there twice is one copy."""
    clones: dict[int, torch.Generator] = {}

    def cloned(generator: torch.Generator) -> torch.Generator:
        if id(generator) not in clones:
            clones[id(generator)] = torch.Generator(generator.device)
            clones[id(generator)].set_state(generator.get_state())
        return clones[id(generator)]

    return tree_map_only(torch.Generator, cloned, tree)
