"""Step parallelism once more, as a definition: one process, and as plain as it can be.

It knows nothing of the package under test. In a round of p steps from x_s on, rank r guesses the latents of step s + r
by stepping from x_s with the last estimate that it made itself, and makes its estimate there. The scheduler is then set
back to where it was when the round began, and steps from x_s with the estimates of all ranks in order.
"""

import copy
import inspect
from typing import Any

import torch
from denoisers import Sampler
from torch import nn


def defined(
    denoiser: nn.Module, sampler: Sampler, scheduler: Any, num_steps: int, steps: int, warm_up: int, seed: int = 0
) -> torch.Tensor:
    """Final latents.

    Args:
        denoiser: The network.
        sampler: The sample's inputs.
        scheduler: As it was built.
        num_steps: Steps of the sample.
        steps: Steps of a round, p.
        warm_up: Exact steps.
        seed: Seed of the noise that the scheduler adds, if it does.
    """
    scheduler.set_timesteps(num_steps)
    times = list(scheduler.timesteps)
    latents = sampler.latents * scheduler.init_noise_sigma
    noise = torch.Generator().manual_seed(seed).get_state()
    own: list[Any] = [None] * steps
    first = 0
    while first < len(times):
        size = 1 if first < warm_up else min(steps, len(times) - first)
        made = []
        for rank in range(size):
            ahead = copy.deepcopy(scheduler)
            guess, _ = replay(ahead, latents, times[first : first + rank], [own[rank]] * rank, noise)
            made.append(sampler.estimate(denoiser, ahead, guess, times[first + rank]))
        latents, noise = replay(scheduler, latents, times[first : first + size], made, noise)
        own = made * steps if first < warm_up else [*made, *own[size:]]
        first += size
    return latents


def replay(
    scheduler: Any, latents: torch.Tensor, times: list[torch.Tensor], estimates: list[torch.Tensor], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps with some estimates, and with noise from a state of the generator; gives the state that follows."""
    generator = torch.Generator()
    generator.set_state(noise)
    drawn = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for time, estimate in zip(times, estimates, strict=True):
        scheduler.scale_model_input(latents, time)
        latents = scheduler.step(estimate, time, latents, **drawn).prev_sample
    return latents, generator.get_state()
