"""DDPM's and DDIM's steps over any subset of the training timesteps, with any number of them.

The step from a state x at noise level ᾱ to one at ᾱ' (Song et al. (2021), "Denoising Diffusion Implicit Models",
equation 12), with the estimate c of the clean data limited to the range of pictures:

    x' = √ᾱ' c + √(1 − ᾱ' − σ²) (x − √ᾱ c) / √(1 − ᾱ) + n ξ,    σ² = η² (1 − ᾱ') / (1 − ᾱ) (1 − ᾱ / ᾱ').

DDIM has n = σ, and adds no noise at η = 0. DDPM has η = 1, which makes the mean that of the posterior (Ho et al.
(2020), "Denoising Diffusion Probabilistic Models", equation 7), and n² = σ² (`fixed_small`), n² = 1 − ᾱ / ᾱ'
(`fixed_large`), or between both as the network says (`learned_range`); over a subset of the timesteps this is the
respacing of Nichol and Dhariwal (2021), section 4. The
schedulers of diffusers step by constant strides, and so cannot take any subset: with 300 of 1000 timesteps they start
at 897.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

SamplerKind = Literal["ddim", "ddpm"]
Skip = Literal["linear", "quadratic"]
Variance = Literal["fixed_small", "fixed_large"]


def pick_timesteps(number: int, total: int, skip: Skip = "linear") -> list[int]:
    """Picks timesteps out of all, each at most once, the first and the last of all among them.

    Args:
        number: How many, from 1 up; one alone is the last of all.
        total: Number of all timesteps T.
        skip: `linear` spaces them evenly; `quadratic` evenly in their square roots, so that most have little noise.

    Returns:
        Timesteps from 0 to T − 1, rising.

    Raises:
        ValueError: There are not so many.
    """
    if not 1 <= number <= total:
        raise ValueError(f"{number} steps cannot be picked out of {total} timesteps; give 1 to {total}.")
    if number == 1:
        return [total - 1]
    places = np.linspace(0, total - 1, number) if skip == "linear" else np.linspace(0, (total - 1) ** 0.5, number) ** 2
    picked = places.round().astype(int).tolist()
    for place in range(1, number):
        # where squares are denser than whole numbers, each takes the next that is free
        picked[place] = max(picked[place], picked[place - 1] + 1)
    return picked


@dataclass
class RespacedOutput(BaseOutput):
    """What a step gives.

    Args:
        prev_sample: State after the step, [B, ...].
        pred_original_sample: The estimate of the clean data, [B, ...].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class RespacedScheduler(SchedulerMixin, ConfigMixin):
    """Steps of DDPM or DDIM over picked timesteps, as a scheduler of diffusers' kind.

    `like` makes one of a `DDPMScheduler` or a `DDIMScheduler`. Its numbers are Python's own, so that a step waits for
    no device, and its noise is given to it.

    Args:
        num_train_timesteps: Number of training timesteps T.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        beta_schedule: diffusers' name of the noise schedule.
        trained_betas: All β, in place of a schedule.
        prediction_type: What the network predicts: `epsilon`, `v_prediction` or `sample`.
        variance_type: Variance of DDPM's noise, `fixed_small`, `fixed_large` or `learned_range`; DDIM's follows from η.
        clip_sample: Whether the estimate of the clean data is limited.
        clip_sample_range: Its greatest absolute value.
        sampler: `ddim` or `ddpm`.
        eta: η of DDIM, 0 (no noise) to 1.
        skip: How the timesteps are picked; see `pick_timesteps`.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        sampler: SamplerKind = "ddim",
        eta: float = 0.0,
        skip: Skip = "linear",
    ) -> None:
        if not 0 <= eta <= 1 or (sampler == "ddpm" and eta):
            raise ValueError(f"eta is {eta} and the sampler {sampler}; give ddim one from 0 to 1, and ddpm none.")
        if sampler == "ddpm" and variance_type not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"variance_type is {variance_type}; ddpm takes fixed_small, fixed_large or learned_range.")
        noise = DDPMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        self.alphas_cumprod = (1 - noise.betas.double()).cumprod(0)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._steps: list[_Step] = []
        self._position = 0

    @classmethod
    def like(cls, scheduler: Any, **changes: Any) -> RespacedScheduler:
        """Makes one with the noise and the settings of another scheduler.

        Args:
            scheduler: A scheduler of diffusers.
            changes: Settings that differ.
        """
        known = inspect.signature(cls.__init__).parameters
        # not `from_config`, which warns of all that only the other one has
        return cls(**{name: value for name, value in scheduler.config.items() if name in known} | changes)

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.config.sampler == "ddpm" or self.config.eta > 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Picks the timesteps of the next samples.

        Args:
            num_inference_steps: How many, 1 to T.
            device: Where `timesteps` are.
        """
        picked = pick_timesteps(num_inference_steps, self.config.num_train_timesteps, self.config.skip)
        levels = [1.0, *self.alphas_cumprod[picked].tolist()]
        pairs = list(zip(levels[1:], levels[:-1], strict=True))
        self._steps = [self._step(level, following, self.config) for level, following in reversed(pairs)]
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(picked[::-1], device=device)
        self._position = 0

    @property
    def hidden_noise(self) -> float:
        """Standard deviation of the noise in the last state beyond what the network is told, in units of the data.

        That is with estimates that are right, after `set_timesteps`. `fixed_large` adds more noise than the next
        timestep has: little in 1000 steps (.009), but .045 in 100, which stays in what is made.
        """
        variance = 1 - self._steps[0].level
        for step in self._steps[:-1]:
            variance = step.from_state**2 * variance + step.noise**2
        # rounding
        return max(0.0, variance - (1 - self._steps[-1].level)) ** 0.5

    @staticmethod
    def _step(level: float, following: float, config: Any) -> _Step:
        eta = 1.0 if config.sampler == "ddpm" else config.eta
        forward = 1 - level / following
        posterior = (1 - following) / (1 - level) * forward
        from_state = max(0.0, 1 - following - eta**2 * posterior) ** 0.5 / (1 - level) ** 0.5
        is_large = config.sampler == "ddpm" and config.variance_type == "fixed_large"
        variance = forward if is_large and following < 1 else eta**2 * posterior
        is_learned = config.sampler == "ddpm" and config.variance_type == "learned_range"
        # the deviation is this to the power of the network's share
        ratio = (forward / posterior) ** 0.5 if is_learned and variance else None
        return _Step(level, from_state, following**0.5 - from_state * level**0.5, variance**0.5, ratio)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as the network takes it: as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, noise: Tensor | None = None) -> RespacedOutput:
        """Takes the next step; which one is counted from `set_timesteps` on, not looked up by the timestep.

        Args:
            model_output: Output of the network, [B, C, ...]; with 2 C channels the rest is a learned variance, which
                is used by `learned_range` alone.
            timestep: What the network was told.
            sample: State before the step, of the same shape.
            noise: Standard normal noise of the same shape, for steps that add some.

        Raises:
            ValueError: The variance is the network's to say, and it says nothing.
        """
        output, between = model_output[:, : sample.shape[1]], model_output[:, sample.shape[1] :]
        step = self._steps[self._position]
        self._position = (self._position + 1) % len(self._steps)
        clean = self._clean(output, sample, step.level)
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        state = step.from_clean * clean + step.from_state * sample
        if step.noise:
            assert noise is not None
            state = state + self._deviation(step, between) * noise
        return RespacedOutput(prev_sample=state, pred_original_sample=clean)

    @staticmethod
    def _deviation(step: _Step, between: Tensor) -> Tensor | float:
        if step.ratio is None:
            return step.noise
        if not between.shape[1]:
            raise ValueError(
                "variance_type is learned_range, but the network gives no variances; set it to fixed_small or "
                "fixed_large."
            )
        return step.noise * step.ratio ** ((between + 1) / 2)

    def _clean(self, output: Tensor, sample: Tensor, level: float) -> Tensor:
        signal, spread = level**0.5, (1 - level) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (sample - spread * output) / signal
        if self.config.prediction_type == "v_prediction":
            return signal * sample - spread * output
        return output


@dataclass(frozen=True)
class _Step:
    """One step: x' = `from_clean` c + `from_state` x + `noise` ξ, from the noise level `level`.

    Where the network says how much noise, `noise` is the least, and `ratio` that of the most to it.
    """

    level: float
    from_state: float
    from_clean: float
    noise: float
    ratio: float | None = None
