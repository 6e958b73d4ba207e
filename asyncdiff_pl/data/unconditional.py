"""Samples that are nothing but a number, for models that need no more."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset
from typing_extensions import override

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.sample import Sample


class _Numbers(Dataset[Sample]):
    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.ids[index])


class Unconditional(SampleDataModule):
    """Asks for pictures by number alone. Nothing says what they show: set `clip_score.model: null`.

    Args:
        number: How many pictures.
        first: Number of the first picture; those from 0 on have been made, say, and more are wanted.
        batch_size: Number of pictures that the pipeline makes in one call.
    """

    def __init__(self, number: int = 64, first: int = 0, batch_size: int = 64) -> None:
        # there is nothing to read ahead
        super().__init__(batch_size)
        self.number = number
        self.first = first

    @override
    def samples(self) -> Dataset[Sample]:
        """The samples, in order."""
        return _Numbers(self.ids())

    @override
    def ids(self) -> Sequence[str]:
        """The samples' numbers."""
        return [str(number) for number in range(self.first, self.first + self.number)]

    @override
    def check(self) -> None:
        """Tells numbers that there cannot be.

        Raises:
            ValueError: In one sentence.
        """
        super().check()
        if self.number < 1 or self.first < 0:
            raise ValueError(
                f"number is {self.number} and first {self.first}; give a number from 1 up and first from 0."
            )
