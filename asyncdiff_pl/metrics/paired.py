"""Whether one way is better than another on the same samples: the mean of paired differences and its standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

ROUNDING = 1e-12
"""What a mean in double precision may be off by, relative to it, with room to spare."""


class Mean(NamedTuple):
    """A mean over samples with the standard error of that mean."""

    value: float
    standard_error: float

    @property
    def in_standard_errors(self) -> float:
        """How many standard errors the mean is away from 0; infinite if all samples agree on another number."""
        if self._is_of_equals:
            return 0.0 if self.value == 0 else float("inf") if self.value > 0 else float("-inf")
        return self.value / self.standard_error

    @property
    def _is_of_equals(self) -> bool:
        """Whether all samples are one number: their sum's rounding may leave an error."""
        return self.standard_error <= ROUNDING * abs(self.value)

    def texts(self, sign: str = "") -> tuple[str, str]:
        """The mean and its standard error as texts, with as many decimals as two digits of the error have.

        Args:
            sign: `+` shows the sign of positive means too.

        Returns:
            Both; the second is empty where there is no error that is known.
        """
        if not math.isfinite(self.standard_error) or not math.isfinite(self.value):
            return f"{self.value:{sign}.4g}", ""
        if self._is_of_equals:
            return f"{self.value:{sign}.4g}", "0"
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:{sign}.{decimals}f}", f"{self.standard_error:.{decimals}f}"


def mean_with_error(values: Tensor) -> Mean:
    """Mean of independent samples and its standard error, s / sqrt(n) with s² = sum (x − mean)² / (n − 1).

    Args:
        values: [n], n from 2 up.

    Raises:
        ValueError: There are fewer than 2 samples.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"A standard error needs 2 or more samples [n]; given is {tuple(values.shape)}.")
    values = values.double()
    return Mean(values.mean().item(), (values.std() / len(values) ** 0.5).item())


def paired_difference(first: Tensor, second: Tensor) -> Mean:
    """Mean of first − second over samples that belong together, and its standard error.

    Args:
        first: [n], n from 2 up: one number a sample.
        second: [n]: those of the same samples, in the same order.

    Raises:
        ValueError: The numbers of samples differ, or there are fewer than 2.
    """
    if first.shape != second.shape:
        raise ValueError(f"Pairs need equal numbers of samples; given are {tuple(first.shape)}, {tuple(second.shape)}.")
    return mean_with_error(first.double() - second.double())
