"""How far two sets of pictures are apart: the Fréchet distance of their features (FID: Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from asyncdiff_pl.metrics.frames import to_bytes
from asyncdiff_pl.metrics.networks import MissingNetwork, first_line

SIDE = 299
"""Height and width in pixels of the picture that tells a network's number of features."""

BATCH = 32
"""Pictures that the network gets at once."""


class FrechetDistance(nn.Module):
    """Distance of two Gaussians fitted to features of real and of generated pictures.

    Sums of features are kept, not the pictures: |m - n|² + tr(S + T - 2 (S T)^½) of means and covariances. With fewer
    pictures than the network has features the distance comes out too large, and only distances of equally many
    pictures compare.

    Args:
        network: Turns pictures [N, 3, H, W], uint8, into features [N, D].

    Raises:
        MissingNetwork: torchmetrics' metric cannot be imported, as when an installed torch-fidelity does not fit.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        # a torchvision built for another torch fails with any of these
        except (ImportError, RuntimeError, OSError) as error:
            raise MissingNetwork(f"torchmetrics' Fréchet distance cannot be imported ({first_line(error)})") from error
        if not hasattr(network, "num_features"):
            # torchmetrics would find out with a picture on the CPU, wherever the network is
            tensors = itertools.chain(network.parameters(), network.buffers(), [torch.empty(0)])
            pictures = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=next(tensors).device)
            with torch.no_grad():
                network.num_features = network(pictures).shape[-1]
        # ranks' sums are brought together by whoever needs them: not all ranks have pictures
        self._metric = FrechetInceptionDistance(network, sync_on_compute=False)

    @property
    def num_features(self) -> int:
        """Features of a picture, D."""
        return len(self._metric.real_features_sum)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of real and of generated pictures so far."""
        return int(self._metric.real_features_num_samples), int(self._metric.fake_features_num_samples)

    @torch.no_grad()
    def add(self, frames: Sequence[Image.Image], is_real: bool) -> None:
        """Adds pictures of any sizes to one of the two sets."""
        for _, group in itertools.groupby(frames, key=lambda frame: frame.size):
            self.add_bytes(to_bytes(list(group)), is_real)

    @torch.no_grad()
    def add_bytes(self, pictures: Tensor, is_real: bool) -> None:
        """Adds pictures [N, 3, H, W], uint8, to one of the two sets."""
        for part in pictures.split(BATCH):
            self._metric.update(part.to(self._metric.device), real=is_real)

    def sums(self) -> dict[str, Tensor]:
        """What has been added, on the CPU: another process can merge it."""
        return {name: state.cpu() for name, state in self._metric.metric_state.items()}

    def merge(self, sums: dict[str, Tensor]) -> None:
        """Adds what another one has been given."""
        self._metric.merge_state({name: state.to(self._metric.device) for name, state in sums.items()})

    @torch.no_grad()
    def compute(self) -> float:
        """The distance, from 0 up.

        Raises:
            ValueError: One of the sets has fewer than 2 pictures.
        """
        if min(self.counts) < 2:
            raise ValueError(
                f"A Fréchet distance needs 2 pictures or more of each kind; given are {self.counts[0]} real ones and "
                f"{self.counts[1]} generated ones."
            )
        # torchmetrics gives the distance in the features' format, which it knows from the last pictures
        self._metric.orig_dtype = torch.float64
        with warnings.catch_warnings():
            # where all pictures were another process's, torchmetrics sees none
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            distance = self._metric.compute().item()
        # what rounding leaves of 0 may be negative
        return max(0.0, distance)
