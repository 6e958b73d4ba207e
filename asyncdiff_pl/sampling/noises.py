"""The noise of each step, drawn before the solver starts, as a sequential run draws it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyncdiff_pl.sampling.coefficients import StepCoefficients, along


def draw_noises(
    generators: Sequence[torch.Generator], number: int, shape: Sequence[int], like: Tensor | None = None
) -> Tensor:
    """Draws each sample's noises from its own generator in the order in which a pipeline's scheduler draws them.

    With the generators as they are once a pipeline has drawn its initial latents, these are the noises that the
    `scheduler.step(..., generator=generators)` of a DDIM (η > 0) or DDPM loop adds.

    Args:
        generators: B generators.
        number: Number of steps N.
        shape: Shape of one sample's latents.
        like: Gives the data type (float32 if left out), as pipelines draw in that of the denoiser, and the device.

    Returns:
        [B, N, ...]; number N − 1 is drawn first, as it is the first step in time.
    """
    dtype = torch.float32 if like is None else like.dtype
    drawn = [
        torch.cat(
            [torch.randn(1, *shape, generator=generator, device=generator.device, dtype=dtype) for _ in range(number)]
        ).flip(0)
        for generator in generators
    ]
    noises = torch.stack(drawn)
    return noises if like is None else noises.to(like.device)


def added_noises(coefficients: StepCoefficients, noises: Tensor | None, latents: Tensor) -> Tensor | None:
    """The noises [B, N, ...] times their standard deviations in float64, or None where steps add none.

    Args:
        coefficients: N steps.
        noises: Unit noises [B, N, ...].
        latents: [B, ...].

    Raises:
        ValueError: The steps add noise, and none or one of another shape is given.
    """
    if not coefficients.stochastic:
        return None
    expected = (len(latents), len(coefficients), *latents.shape[1:])
    if noises is None or noises.shape != expected:
        given = "none are given" if noises is None else f"those given are {tuple(noises.shape)}"
        raise ValueError(f"The steps add noise (eta > 0) and need noises {expected}, but {given}; see draw_noises.")
    deviations = coefficients.noise_deviations.to(latents.device)
    return along(deviations, latents) * noises.to(latents.device, deviations.dtype)
