"""Networks that turn pictures into features, by name: what distances between sets of pictures are measured in."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.metrics.networks import MissingNetwork, first_line
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.classifiers import EFFICIENTNET, EfficientNetFeatures, VGG16Features
from asyncdiff_pl.models.clip import check_clip, is_random, load_clip

INCEPTION = "inception"
"""Name of FID's own network, fetched by torch-fidelity."""

INCEPTION_SCRIPT = "inception-2015-12-05.pt"
"""FID's own network as a TorchScript file, as StyleGAN's authors keep it."""

SCRIPTS = (".pt", ".ts", ".torchscript")
"""Endings of TorchScript files."""


class CLIPFeatures(nn.Module):
    """CLIP's embeddings of pictures, as unit vectors.

    Args:
        name: A hub name, a local folder, or `tiny-clip`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower = TextImageScore(*load_clip(name))
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
            raise ValueError(
                f"{path} holds no TorchScript network ({first_line(error)}); give another file."
            ) from error
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
    if source in (INCEPTION, EFFICIENTNET):
        return
    path = Path(source).expanduser()
    if path.suffix in (*SCRIPTS, ".pth"):
        if not path.is_file():
            raise ValueError(
                f"There is no file {source} of a feature network; give a TorchScript file, `{EFFICIENTNET}`, the name "
                f"of a CLIP model, `{INCEPTION}`, or a class (my_module.MyFeatures)."
            )
    elif _class_path(source) is None:
        check_clip(source)


def load_features(source: str) -> tuple[str, nn.Module]:
    """A feature network and what the distance in its features is called.

    Args:
        source: See `load_network`.

    Returns:
        The column: `fid` with FID's own network, else `frechet_distance (<network>)`; and the network, on the CPU.

    Raises:
        ValueError: There is no such network.
        MissingNetwork: It could not be fetched, or a package that it needs is not there.
    """
    name, network = load_network(source)
    return "fid" if name in (INCEPTION, INCEPTION_SCRIPT) else f"frechet_distance ({name})", network


def load_network(source: str) -> tuple[str, nn.Module]:
    """A network that turns pictures [N, 3, H, W], uint8, into features [N, D], and its name.

    Args:
        source: `inception` (FID's own network, fetched by torch-fidelity if that is installed), a `.pth` file of its
            weights as torch-fidelity keeps them, `efficientnet-lite0` (of the extra `offline-metrics`; nothing is
            fetched), `vgg16-397923af.pth` (any file whose name begins with vgg16: weights as torchvision has them), a
            TorchScript file (.pt) (`inception-2015-12-05.pt` is FID's own), a CLIP model (a hub name, a folder, or
            `tiny-clip`), or a class of one's own (`my_module.MyFeatures`).

    Returns:
        The name, `inception` for FID's own weights; and the network, on the CPU, in eval mode, without gradients.

    Raises:
        ValueError: There is no such network.
        MissingNetwork: It could not be fetched, or a package that it needs is not there.
    """
    check_features(source)
    path = Path(source).expanduser()
    name = path.name if path.exists() else source
    network: nn.Module
    if source == EFFICIENTNET:
        network = EfficientNetFeatures()
    elif path.suffix == ".pth" and path.name.startswith("vgg16"):
        network = VGG16Features(path)
    elif source == INCEPTION or path.suffix == ".pth":
        name, network = INCEPTION, _inception(None if source == INCEPTION else path)
    elif path.suffix in SCRIPTS:
        network = ScriptFeatures(path)
    elif _class_path(source) is not None:
        network = _own_network(source)
    else:
        network = CLIPFeatures(source)
        name += ", random weights" if is_random(source) else ""
    return name, network.requires_grad_(False).eval()


def _inception(weights: Path | None) -> nn.Module:
    remedy = f"install torch-fidelity and a torchvision that fits torch, or give {INCEPTION_SCRIPT} or a CLIP model"
    try:
        importlib.import_module("torch_fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = None if weights is None else str(weights)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).requires_grad_(False)
    # a torchvision built for another torch fails with any of the first three; no network, or a wrong file, as well
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingNetwork(f"FID's Inception network cannot be had ({first_line(error)}); {remedy}") from error


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
        raise ValueError(f"There is no class {source} ({first_line(error)}); give one that can be imported.") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{source} is no torch.nn.Module; give a class that turns pictures into features.")
    return kind()
