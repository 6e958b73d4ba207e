"""Sampling as plain maths on tensors: a scheduler's steps as numbers, and solvers that treat all of them together."""

from asyncdiff_pl.sampling.coefficients import StepCoefficients, read_coefficients
from asyncdiff_pl.sampling.noises import draw_noises
from asyncdiff_pl.sampling.picard import picard
from asyncdiff_pl.sampling.sequential import sequential
from asyncdiff_pl.sampling.solution import Callback, Denoise, Iteration, Solution
from asyncdiff_pl.sampling.triangular_anderson import triangular_anderson

__all__ = [
    "Callback",
    "Denoise",
    "Iteration",
    "Solution",
    "StepCoefficients",
    "draw_noises",
    "picard",
    "read_coefficients",
    "sequential",
    "triangular_anderson",
]
