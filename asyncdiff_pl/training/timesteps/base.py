"""What all samplers of training timesteps have in common, and how one that looks at the network is called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from asyncdiff_pl.training.continuous_noise import spread_uniform
from asyncdiff_pl.training.discrete_noise import PredictionType

Probe = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`probe(timesteps [N], clean [N, C, H, W], noise [N, C, H, W])` gives the network's loss of each sample [N]: the mean
square error of its prediction, unweighted, in eval mode, without gradient, with the weights as they are at the call."""


def same(values: Tensor) -> Tensor:
    """The reduction and the gathering over ranks where there is one rank: nothing happens."""
    return values


class TimestepSampler(nn.Module):
    """Says which timesteps a batch is trained at, and how much each of its samples counts.

    What a sampler learns lies in buffers and parameters, so that checkpoints hold it. Nothing that is called each step
    waits for the device. A sampler trains its parameters by itself; they are no part of the network's optimizer and
    need no gradient while the network's own pass runs.

    A training loop calls, in each step: `draw`; the network's pass; `update`; if `is_due(step)`, `before_step`; the
    optimizer's step; if it was due, `after_step`. With accumulated gradients `draw` and `update` are called once for
    each part of a batch, and the clean data of `before_step` and `after_step` are those of the last part.
    """

    every: int = 0
    """The optimizer's steps between two calls of `before_step` and `after_step`; 0 calls them never."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        """Number of timesteps T, known from `build` on."""
        self.reduce: Callable[[Tensor], Tensor] = same
        """The mean of a tensor over ranks, on all of them; a training loop of several ranks sets it. It may write into
        what it is given, and what it returns is equal on all ranks."""
        self.gather: Callable[[Tensor], Tensor] = same
        """All ranks' tensors of one shape [N, ...], joined along the first dimension in the order of ranks."""

    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        """Makes the buffers, once, before a checkpoint is loaded and before the sampler moves to its device.

        Args:
            alphas_cumprod: ᾱ [T], falling.
            prediction_type: What the network predicts, and the losses are about.
        """
        self.number = len(alphas_cumprod)

    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a timestep for each sample of a batch.

        Args:
            clean: [B, C, H, W], the batch without noise, on the sampler's device.

        Returns:
            Timesteps [B], int64 from 0 to T − 1; and weights [B], float32, that the samples' losses are multiplied by.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how timesteps are drawn.")

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Learns from a training pass.

        Args:
            timesteps: [B], as drawn.
            losses: [B], the loss of each sample without any weight and without gradient, finite: the mean square error,
                or the term of the variational bound where that is trained.
        """

    def is_due(self, step: int) -> bool:
        """Whether `before_step` and `after_step` are called around an optimizer's step.

        Args:
            step: Number of the step, from 0.
        """
        return self.every > 0 and (step + 1) % self.every == 0

    def before_step(self, probe: Probe, clean: Tensor) -> None:
        """Looks at the network before an optimizer's step.

        Args:
            probe: The network's loss of given samples.
            clean: [B, C, H, W], the clean data of the step's last pass.
        """

    def after_step(self, probe: Probe, clean: Tensor) -> None:
        """Looks at the network after the step that `before_step` came before.

        Args:
            probe: The network's loss of given samples.
            clean: The same data as `before_step` got.
        """


def draw_from(probabilities: Tensor, number: int, spread: bool) -> Tensor:
    """Draws timesteps by their probabilities.

    Args:
        probabilities: p [T], of sum 1.
        number: How many timesteps are drawn, B.
        spread: Take one from each of B parts of equal probability, in order, in place of B independent ones: each still
            has the distribution p over a batch, and a batch's mean loss varies less.

    Returns:
        [B], int64.
    """
    if not spread:
        return torch.multinomial(probabilities, number, replacement=True)
    cumulative = probabilities.double().cumsum(0)
    # of the last sum: it is 1 up to rounding, and no draw may lie above it
    places = spread_uniform(number, probabilities.device).double() * cumulative[-1]
    return torch.searchsorted(cumulative, places, right=True).clamp(max=len(probabilities) - 1)
