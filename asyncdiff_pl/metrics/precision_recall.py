"""How much of what is generated looks real, and how much of what is real is generated: improved precision and recall.

After Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric for Assessing Generative Models", section 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from asyncdiff_pl.metrics.frames import to_bytes

BATCH = 32
"""Pictures that the network gets at once."""

NEIGHBOURS = 3
"""The authors' k: which neighbour of its own set a picture's ball reaches to."""

ENTRIES = 2**25
"""Distances that are in memory at once: 256 MiB of them."""


class Agreement(NamedTuple):
    """What two sets have in common, each from 0 to 1.

    Args:
        precision: Share of generated pictures that lie among real ones.
        recall: Share of real pictures that lie among generated ones.
    """

    precision: float
    recall: float


class PrecisionRecall(nn.Module):
    """Precision and recall of generated pictures, by the nearest neighbours of their features.

    A picture lies among those of a set if it is in the ball of one of them, which reaches to its k-th nearest neighbour
    in its own set. Values rise with the number of pictures, so only those of equally many compare.

    Args:
        network: Turns pictures [N, 3, H, W], uint8, into features [N, D].
        neighbours: k.
    """

    def __init__(self, network: nn.Module, neighbours: int = NEIGHBOURS) -> None:
        super().__init__()
        self.network = network
        self.neighbours = neighbours
        self._parts: dict[bool, list[Tensor]] = {True: [], False: []}

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of real and of generated pictures so far."""
        real, generated = (sum(map(len, self._parts[is_real])) for is_real in (True, False))
        return real, generated

    @property
    def least(self) -> int:
        """How many pictures each set must have."""
        return self.neighbours + 1

    def add(self, frames: Sequence[Image.Image], is_real: bool) -> None:
        """Adds pictures of any sizes to one of the two sets."""
        for _, group in itertools.groupby(frames, key=lambda frame: frame.size):
            self.add_bytes(to_bytes(list(group)), is_real)

    @torch.no_grad()
    def add_bytes(self, pictures: Tensor, is_real: bool) -> None:
        """Adds pictures [N, 3, H, W], uint8, to one of the two sets."""
        tensors = itertools.chain(self.network.parameters(), self.network.buffers(), [pictures])
        device = next(tensors).device
        self._parts[is_real] += [self.network(part.to(device)).float() for part in pictures.split(BATCH)]

    def sums(self) -> dict[str, Tensor]:
        """What has been added, on the CPU: another process can merge it."""
        names = {"real": True, "generated": False}
        return {name: torch.cat(self._parts[kind]).cpu() for name, kind in names.items() if self._parts[kind]}

    def merge(self, sums: dict[str, Tensor]) -> None:
        """Adds what another one has been given."""
        for name, features in sums.items():
            self._parts[name == "real"].append(features)

    def compute(self) -> Agreement:
        """Precision and recall of what has been added.

        Raises:
            ValueError: One of the sets has k pictures or fewer.
        """
        if min(self.counts) < self.least:
            raise ValueError(
                f"Precision and recall with k = {self.neighbours} need {self.least} pictures or more of each kind; "
                f"given are {self.counts[0]} real ones and {self.counts[1]} generated ones."
            )
        device = self._parts[False][0].device
        real, generated = (torch.cat([part.to(device) for part in self._parts[kind]]) for kind in (True, False))
        return precision_recall(real, generated, self.neighbours)


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> Agreement:
    """Precision and recall of two sets of features.

    Distances are float64, so that neighbours do not depend on how a device multiplies matrices, and of some rows at
    once.

    Args:
        real: [N, D], N above `neighbours`.
        generated: [M, D], M above `neighbours`.
        neighbours: k.
    """
    real, generated = real.double(), generated.double()
    return Agreement(_share_among(generated, real, neighbours), _share_among(real, generated, neighbours))


def _share_among(features: Tensor, others: Tensor, neighbours: int) -> float:
    """Share of features [N, D] in a ball of one of the others [M, D]."""
    # the nearest is itself
    radii = torch.cat([rows.kthvalue(neighbours + 1).values for rows in _distances(others, others)])
    inside = [(rows <= radii).any(1) for rows in _distances(features, others)]
    return torch.cat(inside).double().mean().item()


def _distances(features: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances [rows, M] of features [N, D] from others [M, D], some rows after the other."""
    for rows in features.split(max(1, ENTRIES // len(others))):
        yield torch.cdist(rows, others)
