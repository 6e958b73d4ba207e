"""Makes sure that all ranks of a pipeline sample the same thing.

Each rank draws its own noise and steps its own scheduler, so ranks that were seeded differently would drift apart
without a word. The inputs of a sample's first denoiser call are compared, and at the end of warm-up one rank's latents
become everybody's: a difference in the last bit does not grow, and a larger one is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

TOLERANCE = 1e-2
"""Relative difference between ranks above which they are not sampling the same."""


class Agreement(TrajectoryListener):
    """Compares the ranks at the start of each sample and at the end of its warm-up.

    Args:
        denoiser: The network; a hook on it sees the first call's inputs.
        trajectory: Where the pipeline stands.
        exchange: Messages of this rank.
        warm_up: Exact steps at the start of a sample.
    """

    def __init__(self, denoiser: nn.Module, trajectory: Trajectory, exchange: Exchange, warm_up: int) -> None:
        self.trajectory = trajectory
        self.exchange = exchange
        self.warm_up = warm_up
        self._is_new = False
        trajectory.subscribe(self)
        self._handle = denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def remove(self) -> None:
        """Stops comparing."""
        self.trajectory.unsubscribe(self)
        self._handle.remove()

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Has the call that follows compared."""
        self._is_new = True

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """Takes over one rank's latents at the end of warm-up."""
        if trajectory.position != self.warm_up - 1:
            return
        latents = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        agreed = latents.clone(memory_format=torch.contiguous_format)
        self.exchange.broadcast([agreed], 0)
        difference = (latents - agreed).float().norm() / agreed.float().norm()
        if float(self.exchange.spread(difference.reshape(1).double())) > TOLERANCE:
            raise ValueError(
                f"The ranks' latents drifted apart in the first {self.warm_up} steps: the scheduler adds noise that "
                "differs between ranks; seed all ranks alike (`torch.manual_seed`) or pass `generator=`."
            )
        latents.copy_(agreed)

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_new:
            return
        self._is_new = False
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        # a timestep may lie on the CPU, where the process group cannot reach it
        device = max(tensors, key=torch.Tensor.numel).device
        prints = torch.stack([_print(tensor).to(device) for tensor in tensors])
        spread = self.exchange.spread(prints[:, 0])
        differs = (spread > TOLERANCE * prints[:, 1]).any()
        # each rank measures by its own scale: they must come to the same end, or one waits for the others for ever
        if bool(self.exchange.spread(differs.double().reshape(1)) + differs):
            raise ValueError(
                "The ranks of a pipeline were called with different inputs: give every rank the same prompt or image "
                "and the same seed (`generator=torch.Generator().manual_seed(...)`)."
            )


def _print(tensor: torch.Tensor) -> torch.Tensor:
    """A number that another tensor would hardly give, and its scale."""
    flat = tensor.detach().flatten().double()
    phase = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64).sin()
    norm = flat.norm()
    return torch.stack([(flat * phase).sum(), norm + 1e-12])
