"""How long the warm-up of a sample lasts: a number of steps, or until noise or drift is low enough.

Stages compute from what the others made a step before, which is near to what they make now where boundary tensors
change little from step to step. That is so when little noise is left, and it can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class WarmUp:
    """Exact steps at the start of a sample, for as long as they are needed: until all that is given here holds.

    Args:
        until_noise: Share of noise in the latents, from 0 to 1, at which steps need no longer be exact: `0.97` say, 6
            of 25 steps with Stable Diffusion's DDIM. It is sigma for flow matching (SD3, FLUX), sigma / sqrt(1 +
            sigma^2) for other schedulers that have sigmas, and sqrt(1 - alphas_cumprod) for the rest; null does not ask
            for it.
        until_drift: Change of the boundary tensors from one exact step to the next at which steps need no longer be
            exact, as a share of the tensors' norm, over all samples of a call together: `0.1` say. It is known from
            the second step on; null does not ask for it.
        at_least: Exact steps at least, 1 or more.
        at_most: Exact steps at most; null for as many as it takes.

    Raises:
        ValueError: A number is out of range, or neither noise nor drift is given.
    """

    until_noise: float | None = None
    until_drift: float | None = None
    at_least: int = 1
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.until_noise is None and self.until_drift is None:
            raise ValueError("warm_up has neither until_noise nor until_drift: give one of them, or a number of steps.")
        if self.until_noise is not None and not 0 <= self.until_noise <= 1:
            raise ValueError(f"until_noise is {self.until_noise}; it is a share of noise and must be from 0 to 1.")
        if self.until_drift is not None and not self.until_drift > 0:
            raise ValueError(f"until_drift is {self.until_drift}; it is a relative change and must be above 0.")
        if self.at_least < 1:
            raise ValueError(f"at_least is {self.at_least}; at least 1 exact step has to fill the stages' inputs.")
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most is {self.at_most}, but at_least is {self.at_least}; give at_least or more.")

    def __str__(self) -> str:
        words = [f"until noise {self.until_noise:g}"] if self.until_noise is not None else []
        words += [f"until drift {self.until_drift:g}"] if self.until_drift is not None else []
        text = " and ".join(words)
        text += f", at least {self.at_least}" if self.at_least > 1 else ""
        return text + (f", at most {self.at_most}" if self.at_most is not None else "")


@dataclass(frozen=True)
class Span:
    """How many exact steps a warm-up may take.

    Args:
        fewest: Steps at least.
        most: Steps at most; None for all that there are.
    """

    fewest: int
    most: int | None

    @property
    def length(self) -> int | None:
        """The number of steps where it is known beforehand, else None: drift decides."""
        return self.fewest if self.fewest == self.most else None

    def ends(self, steps: int, is_still: bool) -> bool:
        """Whether warm-up is over.

        Args:
            steps: Exact steps so far.
            is_still: Whether drift is low enough.
        """
        return steps >= self.fewest and (is_still or steps == self.most)


def span_of(warm_up: int | WarmUp, levels: Callable[[], Sequence[float]] | None) -> Span:
    """How long a warm-up may last.

    Args:
        warm_up: The setting.
        levels: Gives the share of noise before each step, from where warm-up begins; it is asked only where noise
            decides. None if it cannot be known yet.
    """
    if isinstance(warm_up, int):
        return Span(warm_up, warm_up)
    fewest, most = warm_up.at_least, warm_up.at_most
    if warm_up.until_drift is not None and most != 1:
        # one step alone has nothing to be compared with
        fewest = max(fewest, 2)
    if warm_up.until_noise is not None:
        if levels is None:
            return Span(fewest, most)
        shares = levels()
        needed = next((step for step, share in enumerate(shares) if share <= warm_up.until_noise), len(shares))
        fewest = max(fewest, needed if most is None else min(needed, most))
    return Span(fewest, fewest if warm_up.until_drift is None else most)


def count_exact(warm_up: int, refresh_every: int | None, num_steps: int) -> int:
    """Exact steps of a sample, those of the refresh among them.

    Args:
        warm_up: Exact steps at the start.
        refresh_every: Each how many-th step after them is exact; None for none.
        num_steps: Steps of the sample.
    """
    rest = max(0, num_steps - warm_up)
    return num_steps - rest + (rest // refresh_every if refresh_every is not None else 0)


# -- noise ------------------------------------------------------------------------------------------------------------


def noise_levels(scheduler: Any) -> list[float]:
    """The share of noise in the latents before each of a scheduler's timesteps, from 0 to 1.

    Args:
        scheduler: A diffusers scheduler whose timesteps are set.

    Raises:
        ValueError: The scheduler does not tell.
    """
    timesteps = scheduler.timesteps
    sigmas, cumulated = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    config = getattr(scheduler, "config", {})
    # the last sigma is what the last step leaves; schedulers with half steps (KDPM2) have sigmas of another number
    if sigmas is not None and len(sigmas) - len(timesteps) in (0, 1):
        sigmas = torch.as_tensor(sigmas)[: len(timesteps)].double().cpu()
        scale = 1.0 if cumulated is not None else config.get("sigma_data")
        if config.get("use_flow_sigmas") or (scale is None and sigmas.max() <= 1):
            return sigmas.tolist()
        if scale is not None:
            return (1 / (1 + (scale / sigmas) ** 2).sqrt()).tolist()
    elif cumulated is not None:
        cumulated = torch.as_tensor(cumulated).double().cpu()
        at = timesteps.double().cpu().clamp(0, len(cumulated) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(cumulated) - 1)
        return (1 - torch.lerp(cumulated[below], cumulated[above], at - below)).clamp(0, 1).sqrt().tolist()
    raise ValueError(
        f"{type(scheduler).__name__} does not tell how much noise is left (it has neither sigmas nor alphas_cumprod): "
        "give warm_up a number of steps or until_drift, or take another scheduler."
    )


# -- drift ------------------------------------------------------------------------------------------------------------


class Drift:
    """How much boundary tensors change from one exact step to the next, over all ranks that consume them.

    Args:
        num_ranks: Ranks of the pipeline.
        device: Where the denoiser computes.
    """

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
        self._device = device

    def compare(self, rank: int, before: torch.Tensor, now: torch.Tensor) -> None:
        """Adds a tensor that a rank consumes, as it was a step before and as it is now."""
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in (now - before, now)]
        self._norms[rank].append(torch.stack(norms).double())

    def sums(self) -> torch.Tensor:
        """For each rank the sum of squares of changes and of tensors, [ranks, 2]; 0 for ranks of other processes."""
        nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
        return torch.stack([torch.stack(own).square().sum(0) if own else nothing for own in self._norms])


def is_still(sums: torch.Tensor, until_drift: float) -> bool:
    """Whether boundary tensors change little enough.

    Args:
        sums: Sums of squares of all ranks, as `Drift.sums` gives them.
        until_drift: Largest relative change.
    """
    change, size = sums.sum(0).sqrt().tolist()
    return math.isfinite(size) and change <= until_drift * size
