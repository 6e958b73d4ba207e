"""Which timesteps a network is trained at: evenly, by fixed rules, or by what the training itself shows."""

from asyncdiff_pl.training.timesteps.adaptive import AdaptiveTimesteps
from asyncdiff_pl.training.timesteps.base import Probe, TimestepSampler
from asyncdiff_pl.training.timesteps.beta_policy import BetaPolicy
from asyncdiff_pl.training.timesteps.second_moment import LossSecondMoment
from asyncdiff_pl.training.timesteps.speed import SpeeD
from asyncdiff_pl.training.timesteps.uniform import UniformTimesteps

__all__ = [
    "AdaptiveTimesteps",
    "BetaPolicy",
    "LossSecondMoment",
    "Probe",
    "SpeeD",
    "TimestepSampler",
    "UniformTimesteps",
]
