"""What one step of a diffusers scheduler does, as numbers: X_i = a_i X_{i+1} + d_i ε(X_{i+1}, i) + n_i ξ_i.

Solvers that treat all steps of a sample together need each step as a linear function of the state X, the noise
estimate ε and fresh noise ξ. DDIM is that already (Song et al. (2021), "Denoising Diffusion Implicit Models", equation
12), DDPM is its η = 1, and Euler's step over σ is DDIM's at η = 0 once the state is divided by √(1 + σ²).

Step i leads from state i + 1 to state i, i = 0 … N − 1: state N is noise, state 0 the result, and a scheduler's first
step is step N − 1. All states have the variance preserving scale, which is what the denoiser is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
_DDPM = (DDPMScheduler, DDPMParallelScheduler)
_DDIM = (DDIMScheduler, DDIMParallelScheduler)
_SMALLEST_VARIANCE = 1e-20  # DDPM's, where there is none to add


@dataclass(frozen=True)
class StepCoefficients:
    """N steps; all tensors are [N], float64 but for the timesteps, and number i belongs to the step to state i.

    Args:
        timesteps: What the denoiser is told.
        levels: ᾱ of state i + 1.
        next_levels: ᾱ of state i.
        state_factors: a, √(ᾱ of state i / ᾱ of state i + 1).
        estimate_factors: d.
        noise_deviations: n, the standard deviation of the noise that the step adds.
        posterior_deviations: s, what n would be at η = 1 with the posterior's variance.
        prediction_type: What the denoiser predicts.
        limit: What the scheduler makes of an estimate of the clean data [M, ...] (clipping, thresholding); None for
            nothing.
        follows_limit: Whether the step's noise estimate is that of the limited clean data (DDPM) or stays (DDIM).
        initial_scale: What the latents of a pipeline are multiplied with to be state N.
        final_scale: What state 0 is multiplied with to be the latents that a pipeline ends with.
    """

    timesteps: Tensor
    levels: Tensor
    next_levels: Tensor
    state_factors: Tensor
    estimate_factors: Tensor
    noise_deviations: Tensor
    posterior_deviations: Tensor
    prediction_type: PredictionType
    limit: Callable[[Tensor], Tensor] | None = None
    follows_limit: bool = False
    initial_scale: float = 1.0
    final_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether the steps add noise."""
        return bool(self.noise_deviations.any())

    @property
    def latent_scales(self) -> Tensor:
        """What each state is multiplied with to be a pipeline's latents at that point, [N + 1]."""
        levels = torch.cat([self.next_levels, self.levels[-1:]])
        return torch.ones_like(levels) if self.initial_scale == 1.0 else levels.rsqrt()

    def last(self, number: int) -> StepCoefficients:
        """The last steps in time alone, whose noise is the state that they begin with.

        Args:
            number: How many, from 1 up.
        """
        tensors = {name: value[:number] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, initial_scale=1 / float(self.latent_scales[number]))

    def to(self, device: torch.device) -> StepCoefficients:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def noise_estimates(self, outputs: Tensor, states: Tensor, steps: slice) -> Tensor:
        """Turns outputs of the denoiser into the noise estimates ε with which the steps are the scheduler's own.

        A limit on the clean data makes the scheduler's step differ from the one that belongs to the denoiser's
        output; ε is then what leads to the same state.

        Args:
            outputs: Outputs [M, ...] of the denoiser, as the prediction type says.
            states: What it was given [M, ...], float64.
            steps: The M steps, or one step for all M.

        Returns:
            [M, ...], float64.
        """
        outputs = outputs.to(states.dtype)
        levels = along(self.levels[steps], states)
        signal, spread = levels.sqrt(), (1 - levels).sqrt()
        if self.prediction_type == "epsilon":
            estimates = outputs
        elif self.prediction_type == "v_prediction":
            estimates = signal * outputs + spread * states
        else:
            estimates = (states - signal * outputs) / spread
        if self.limit is None:
            return estimates
        clean = (states - spread * estimates) / signal
        change = self.limit(clean) - clean
        if self.follows_limit:
            return estimates - signal / spread * change
        next_signal = along(self.next_levels[steps], states).sqrt()
        return estimates + next_signal / along(self.estimate_factors[steps], states) * change


def along(numbers: Tensor, states: Tensor) -> Tensor:
    """Numbers [M] as [M, 1, ...], to be multiplied with states [M, ...]."""
    return numbers.view(-1, *[1] * (states.ndim - 1))


def check_kind(kind: type[Any]) -> None:
    """Tells that schedulers of a class cannot be read.

    Args:
        kind: The class.

    Raises:
        ValueError: Their steps are not of this form.
    """
    if not issubclass(kind, (*_DDIM, *_DDPM, EulerDiscreteScheduler)):
        raise ValueError(
            f"{kind.__name__} cannot be solved in parallel in time, since its steps are not known as linear in the "
            "state and the noise estimate; take ddim, ddpm or euler_discrete."
        )


def read_coefficients(scheduler: Any, eta: float | None = None) -> StepCoefficients:
    """Reads the steps of a scheduler whose `set_timesteps` was called.

    Args:
        scheduler: A DDIM, DDPM or Euler scheduler of diffusers.
        eta: η from 0 (the ODE) to 1 (DDPM's SDE); None for the scheduler's own: 1 for DDPM, else 0. On an
            Euler scheduler, whose own step adds no noise, it is that of DDIM at Euler's noise levels.

    Returns:
        The coefficients, on the CPU.

    Raises:
        ValueError: The scheduler's steps are not of this form, or η is out of range.
    """
    name = type(scheduler).__name__
    check_kind(type(scheduler))
    eta = float(isinstance(scheduler, _DDPM)) if eta is None else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give one from 0 (no noise) to 1 (the noise of DDPM).")
    if scheduler.num_inference_steps is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError(f"{name} has no timesteps yet; call its set_timesteps first.")
    prediction_type = scheduler.config.prediction_type.removeprefix("original_")
    if prediction_type not in get_args(PredictionType):
        raise ValueError(
            f"{name} has prediction_type {prediction_type}; the solvers know {', '.join(get_args(PredictionType))}."
        )
    levels, next_levels = (table.flip(0) for table in _levels(scheduler))
    if not bool((levels > 0).all()):
        raise ValueError(
            f"{name} begins at a signal-to-noise ratio of zero (rescale_betas_zero_snr), where a noise estimate says "
            "nothing about the clean data; set rescale_betas_zero_snr to false, or timestep_spacing to leading."
        )
    timesteps = scheduler.timesteps.cpu().flip(0)
    posterior = (1 - next_levels) / (1 - levels) * (1 - levels / next_levels)
    state_factors = (next_levels / levels).sqrt()
    direction = (1 - next_levels - eta**2 * posterior).clamp(min=0).sqrt()
    estimate_factors = direction - state_factors * (1 - levels).sqrt()
    noise_variances = posterior
    if isinstance(scheduler, _DDPM) and eta > 0:
        noise_variances = _ddpm_variances(scheduler, posterior, 1 - levels / next_levels, timesteps)
    limit = _limit(scheduler)
    if limit is not None and isinstance(scheduler, _DDIM) and bool((estimate_factors == 0).any()):
        raise ValueError(
            f"{name} clips the clean data in a step that leaves the noise as it is (set_alpha_to_one is false and "
            "steps_offset 0), which no noise estimate can say; set clip_sample and thresholding to false."
        )
    over_sigma = isinstance(scheduler, EulerDiscreteScheduler)
    return StepCoefficients(
        timesteps=timesteps,
        levels=levels,
        next_levels=next_levels,
        state_factors=state_factors,
        estimate_factors=estimate_factors,
        noise_deviations=eta * noise_variances.sqrt(),
        posterior_deviations=posterior.sqrt(),
        prediction_type=prediction_type,
        limit=limit,
        follows_limit=isinstance(scheduler, _DDPM),
        initial_scale=float(levels[-1].sqrt()) if over_sigma else 1.0,
        final_scale=float(next_levels[0].rsqrt()) if over_sigma else 1.0,
    )


def _levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """ᾱ before and after each step in the scheduler's order, with what the scheduler itself takes for the last."""
    if isinstance(scheduler, EulerDiscreteScheduler):
        levels = 1 / (1 + scheduler.sigmas.cpu().double() ** 2)
        return levels[:-1], levels[1:]
    table = scheduler.alphas_cumprod.cpu().double()
    timesteps = scheduler.timesteps.cpu()
    if isinstance(scheduler, _DDPM):
        following, final = torch.cat([timesteps[1:], timesteps.new_tensor([-1])]), torch.ones(())
    else:
        following = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        final = torch.as_tensor(scheduler.final_alpha_cumprod).cpu()
    return table[timesteps], torch.where(following >= 0, table[following.clamp(min=0)], final.double())


def _ddpm_variances(scheduler: Any, posterior: Tensor, large: Tensor, timesteps: Tensor) -> Tensor:
    kind = scheduler.variance_type
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(
            f"{type(scheduler).__name__} has variance_type {kind}, whose noise is not known before the denoiser's "
            "output; set variance_type to fixed_small, or eta to 0."
        )
    variances = large if kind == "fixed_large" else posterior.clamp(min=_SMALLEST_VARIANCE)
    return torch.where(timesteps > 0, variances, 0.0)


def _limit(scheduler: Any) -> Callable[[Tensor], Tensor] | None:
    if isinstance(scheduler, EulerDiscreteScheduler):  # made from another's config, it may carry these words along
        return None
    if scheduler.config.thresholding:
        return scheduler._threshold_sample
    bound = scheduler.config.clip_sample_range
    return (lambda clean: clean.clamp(-bound, bound)) if scheduler.config.clip_sample else None
