"""Which timesteps a network is trained at: evenly, by fixed rules, or by what the training itself shows."""

from asyncdiff_pl.training.timesteps.base import Probe, TimestepSampler
from asyncdiff_pl.training.timesteps.uniform import UniformTimesteps

__all__ = ["Probe", "TimestepSampler", "UniformTimesteps"]
