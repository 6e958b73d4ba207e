"""How much of what was generated looks real, and how much of what is real was generated, for each step count."""

from __future__ import annotations

import logging

from torch import nn
from typing_extensions import override

from asyncdiff_pl.callbacks.against_real import AgainstReal, Measure
from asyncdiff_pl.metrics import precision_recall
from asyncdiff_pl.models.features import load_network

log = logging.getLogger(__name__)


class PrecisionRecall(AgainstReal):
    """Measures improved precision and recall of what was generated, for each step count.

    All frames of a sample count. Columns of results.csv, and scalars `results/<column>` of TensorBoard, are `precision
    (<network>)`, the share of generated pictures that lie among real ones, and `recall (<network>)`, the share of real
    ones that lie among generated ones. Both rise with the number of pictures: only values of equally many compare. The
    authors take VGG16, 50,000 pictures of each kind and 3 neighbours.

    Args:
        real: Folder of real pictures, which are brought to the size of the generated ones (cropped); or an .npz file,
            or a folder with CIFAR-10, as the data module `Cifar10` takes them; null measures nothing.
        features: The network: the file `vgg16-397923af.pth` (weights of VGG16 as torchvision has them), or any other
            that `frechet_distance.features` takes.
        max_real: Takes so many real pictures, evenly spread over all; null takes all.
        neighbours: Which neighbour of its own set a picture's ball reaches to.
    """

    title = "precision and recall"

    def __init__(
        self,
        real: str | None = None,
        features: str = "vgg16-397923af.pth",
        max_real: int | None = 10_000,
        neighbours: int = precision_recall.NEIGHBOURS,
    ) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours is {neighbours}; give a number from 1 up.")
        super().__init__(real, features, max_real)
        self.neighbours = neighbours
        self._name = ""

    @override
    def load(self) -> nn.Module:
        self._name, network = load_network(self.features)
        return network

    @override
    def new_measure(self, network: nn.Module) -> precision_recall.PrecisionRecall:
        return precision_recall.PrecisionRecall(network, self.neighbours)

    @override
    def columns(self, total: Measure, steps: int) -> dict[str, float]:
        assert isinstance(total, precision_recall.PrecisionRecall)
        if min(total.counts) < total.least:
            log.warning(
                "There is no precision and no recall for %d steps: they need %d pictures of each kind, and there are "
                "%d generated and %d real ones.",
                *(steps, total.least, total.counts[1], total.counts[0]),
            )
            return {}
        found = total.compute()
        return {f"precision ({self._name})": found.precision, f"recall ({self._name})": found.recall}
