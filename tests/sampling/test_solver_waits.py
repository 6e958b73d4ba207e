"""The CPU waits for the device once an iteration, for the residuals: on a device where waiting is seen."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from diffusers import DDIMScheduler
from far_device import FarDevice, near
from mixture import problem

from asyncdiff_pl.sampling import picard, read_coefficients, triangular_anderson

SHAPE = (3, 4, 4)
NUMBER = 12


class CountingDevice(FarDevice):
    """Notes what makes the CPU wait, and lets it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, function):
        self.waits.append(function)


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        (triangular_anderson, {"window": 5, "memory": 3}),
        (triangular_anderson, {"order": 1, "memory": 1, "safeguard": False}),
        (picard, {"window": 5}),
    ],
)
def test_one_wait_an_iteration(solver, settings):
    _, latents, _, noises = problem(NUMBER, 1.0, 2, SHAPE)
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # which clips
    scheduler.set_timesteps(NUMBER)
    coefficients = read_coefficients(scheduler, 1.0)

    def denoise(states, timesteps, samples, steps):
        counts.append(len(device.waits))
        assert states.device == timesteps.device
        return torch.tanh(states * 2) - (timesteps / 1000).view(-1, 1, 1, 1)

    counts, device = [], CountingDevice()
    expected = solver(denoise, latents, coefficients, noises=noises, **settings)
    counts.clear()
    with device:
        latents, noises = device.put((latents, noises))
        found = solver(denoise, latents, coefficients, noises=noises, **settings)
    waits = [after - before for before, after in itertools.pairwise(counts)]
    assert waits == [1] * (max(found.iterations) - 1)
    assert found.iterations == expected.iterations
    torch.testing.assert_close(near(found.latents), expected.latents)
