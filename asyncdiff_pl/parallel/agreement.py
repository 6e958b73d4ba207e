"""Makes sure that all ranks of a pipeline sample the same thing.

Each rank draws its own noise and steps its own scheduler, so ranks that were seeded differently would drift apart
without a word. The inputs of a sample's first denoiser call are compared, and at the end of warm-up, and of each exact
refresh, one rank's latents become everybody's: a difference in the last bit does not grow, and a larger one is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
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
        is_due: Whether the step in work is the last exact one for now: the end of warm-up, or a refresh.
    """

    def __init__(
        self, denoiser: nn.Module, trajectory: Trajectory, exchange: Exchange, is_due: Callable[[], bool]
    ) -> None:
        self.trajectory = trajectory
        self.exchange = exchange
        self.is_due = is_due
        self._is_new = False
        self._is_checked = False
        trajectory.subscribe(self)
        self._handle = denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def remove(self) -> None:
        """Stops comparing."""
        self.trajectory.unsubscribe(self)
        self._handle.remove()

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Has the call that follows compared."""
        self._is_new, self._is_checked = True, False

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """Takes over one rank's latents at the end of warm-up and at each refresh."""
        if not self.is_due():
            return
        latents = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        agreed = latents.clone(memory_format=torch.contiguous_format)
        self.exchange.broadcast([agreed], 0)
        if not self._is_checked:
            # once a sample: the CPU waits for the GPU to look
            self._is_checked = True
            difference = (latents - agreed).float().norm() / agreed.float().norm()
            if float(self.exchange.spread(difference.reshape(1).double())) > TOLERANCE:
                raise ValueError(
                    f"The ranks' latents drifted apart in the first {trajectory.position + 1} steps: the scheduler "
                    "adds noise that differs between ranks; seed all ranks alike (`torch.manual_seed`) or pass "
                    "`generator=`."
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
