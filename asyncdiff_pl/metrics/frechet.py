"""How far two sets of pictures are apart: the Fréchet distance of their features (FID: Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.metrics.frames import to_bytes
from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.clip import check_clip, is_random, load_clip

INCEPTION = "inception"
"""Name of FID's own network, fetched by torch-fidelity."""

INCEPTION_SCRIPT = "inception-2015-12-05.pt"
"""FID's own network as a TorchScript file, as StyleGAN's authors keep it."""

SCRIPTS = (".pt", ".ts", ".torchscript")
"""Endings of TorchScript files."""

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
            raise MissingNetwork(f"torchmetrics' Fréchet distance cannot be imported ({_line(error)})") from error
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
            pictures = to_bytes(list(group))
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
        # what rounding leaves of 0 may be negative
        return max(0.0, self._metric.compute().item())


class CLIPFeatures(nn.Module):
    """CLIP's embeddings of pictures, as unit vectors.

    Args:
        name: A hub name, a local folder, or `tiny-clip`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower = TextImageScore(*load_clip(name), batch_size=BATCH)
        self.num_features: int = self.tower.model.config.projection_dim

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return self.tower.embed_images([Image.fromarray(array) for array in arrays])


class ScriptFeatures(nn.Module):
    """Features of a TorchScript network that takes pictures [N, 3, H, W], uint8.

    Args:
        path: The file.

    Raises:
        ValueError: It holds no TorchScript.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} holds no TorchScript network ({_line(error)}); give another file.") from error
        names = [argument.name for argument in self.network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures, **self.options).flatten(1)


def check_features(source: str) -> None:
    """Tells early that there is no such network, without loading or fetching anything.

    Args:
        source: See `load_features`.

    Raises:
        ValueError: In one sentence, with the remedy.
    """
    if source == INCEPTION:
        return
    path = Path(source).expanduser()
    if path.suffix in (*SCRIPTS, ".pth"):
        if not path.is_file():
            raise ValueError(
                f"There is no file {source} for the Fréchet distance; give a TorchScript file, the name of a CLIP "
                f"model, `{INCEPTION}`, or a class (my_module.MyFeatures)."
            )
    elif _class_path(source) is None:
        check_clip(source)


def load_features(source: str) -> tuple[str, nn.Module]:
    """A feature network and what the distance in its features is called.

    Args:
        source: `inception` (FID's own network, fetched by torch-fidelity if that is installed), a `.pth` file of its
            weights as torch-fidelity keeps them, a TorchScript file (.pt) that turns pictures [N, 3, H, W], uint8, into
            features (`inception-2015-12-05.pt` is FID's own), a CLIP model (a hub name, a folder, or `tiny-clip`), or a
            class of one's own (`my_module.MyFeatures`).

    Returns:
        The column: `fid` with FID's own network, else `frechet_distance (<network>)`; and the network, on the CPU.

    Raises:
        ValueError: There is no such network.
        MissingNetwork: It could not be fetched, or a package that it needs is not there.
    """
    check_features(source)
    path = Path(source).expanduser()
    if source == INCEPTION or path.suffix == ".pth":
        return "fid", _inception(None if source == INCEPTION else path)
    name = path.name if path.exists() else source
    if path.suffix in SCRIPTS:
        network: nn.Module = ScriptFeatures(path)
    elif _class_path(source) is not None:
        network = _own_network(source)
    else:
        network = CLIPFeatures(source)
        name += ", random weights" if is_random(source) else ""
    column = "fid" if name == INCEPTION_SCRIPT else f"frechet_distance ({name})"
    return column, network.requires_grad_(False).eval()


def _inception(weights: Path | None) -> nn.Module:
    remedy = f"install torch-fidelity and a torchvision that fits torch, or give {INCEPTION_SCRIPT} or a CLIP model"
    try:
        importlib.import_module("torch_fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).requires_grad_(False)
    # a torchvision built for another torch fails with any of the first three; no network, or a wrong file, as well
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingNetwork(f"FID's Inception network cannot be had ({_line(error)}); {remedy}") from error


def _class_path(source: str) -> tuple[str, str] | None:
    """Module and class of `my_module.MyFeatures`; None if it is neither a folder nor such a name."""
    module, _, name = source.rpartition(".")
    is_path = Path(source).expanduser().exists() or "/" in source
    return (module, name) if module and name.isidentifier() and name[:1].isupper() and not is_path else None


def _own_network(source: str) -> nn.Module:
    module, name = _class_path(source) or ("", "")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no class {source} ({_line(error)}); give one that can be imported.") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{source} is no torch.nn.Module; give a class that turns pictures into features.")
    return kind()


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
