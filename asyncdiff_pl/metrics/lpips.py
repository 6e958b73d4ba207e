"""How near pictures are to a reference to the eye: LPIPS with AlexNet (Zhang et al. 2018, eq. 1)."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from typing_extensions import override

from asyncdiff_pl.metrics.networks import FETCH, fetch_weights

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
"""AlexNet trained on ImageNet, as torchvision has it: LPIPS was fitted to its layers."""

LAYERS = (1, 4, 7, 9, 11)
"""Layers of AlexNet whose outputs are compared: each convolution's, after its ReLU."""

CHANNELS = (64, 192, 384, 256, 256)
"""Their channels."""

SMALLEST = 31
"""Height and width in pixels below which AlexNet's last layer has nothing left."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet's colours, for pixels from -1 to 1."""


class LPIPS(nn.Module):
    """Distance of pictures in AlexNet's features, weighted as people judged: 0 for equal pictures.

    The weights of the channels come with torchmetrics; those of AlexNet do not.

    Args:
        alexnet: AlexNet's weights under torchvision's names; what is not of its convolutions is not needed.

    Raises:
        ValueError: They are not AlexNet's.
    """

    def __init__(self, alexnet: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = alexnet_features()
        needed = {name: alexnet.get(f"features.{name}") for name in self.features.state_dict()}
        expected = {name: tensor.shape for name, tensor in self.features.state_dict().items()}
        if any(tensor is None or tensor.shape != expected[name] for name, tensor in needed.items()):
            raise ValueError("The weights for LPIPS are not those of AlexNet as torchvision has it; give its file.")
        self.features.load_state_dict(needed)
        path = Path(torchmetrics_lpips.__file__).parent / "lpips_models" / "alex.pth"
        heads = torch.load(path, map_location="cpu", weights_only=True)
        for index in range(len(LAYERS)):
            self.register_buffer(f"head{index}", heads[f"lin{index}.model.1.weight"].flatten())
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    @override
    @torch.no_grad()
    def forward(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """Distance of each picture from its reference.

        Args:
            pictures: [N, 3, H, W], values from 0 to 1; 31 pixels high and wide or more.
            reference: What they should be, of the same shape.

        Returns:
            [N], float32, from 0 up.

        Raises:
            ValueError: The shapes differ, or the pictures are too small.
        """
        if pictures.shape != reference.shape or pictures.ndim != 4:
            raise ValueError(
                f"LPIPS compares pictures [N, 3, H, W] of one shape; given are {tuple(pictures.shape)} and "
                f"{tuple(reference.shape)}."
            )
        if min(pictures.shape[-2:]) < SMALLEST:
            height, width = pictures.shape[-2:]
            raise ValueError(
                f"LPIPS needs pictures of {SMALLEST} x {SMALLEST} pixels or more; given are {width} x {height}."
            )
        first, second = ((2 * x.float() - 1 - self.shift) / self.scale for x in (pictures, reference))
        distance = torch.zeros(len(pictures), device=pictures.device)
        for index, layer in enumerate(self.features):
            first, second = layer(first), layer(second)
            if index in LAYERS:
                head = getattr(self, f"head{LAYERS.index(index)}")
                squares = (_unit(first) - _unit(second)).square()
                distance = distance + torch.einsum("nchw,c->nhw", squares, head).mean((1, 2))
        return distance


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet ("One weird trick", Krizhevsky 2014), under torchvision's names."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def check_lpips(source: str) -> None:
    """Tells early that there is no such file.

    Args:
        source: Path of AlexNet's weights, or `fetch`.

    Raises:
        ValueError: There is no such file.
    """
    if source != FETCH and not Path(source).expanduser().is_file():
        raise ValueError(
            f"There is no file {source} for LPIPS; give the path of {ALEXNET.rpartition('/')[2]}, or `{FETCH}`."
        )


def load_lpips(source: str) -> LPIPS:
    """The network of LPIPS, on the CPU.

    Args:
        source: Path of AlexNet's weights as torchvision has them, or `fetch`.

    Raises:
        ValueError: There is no such file, or it holds other weights.
        MissingNetwork: The weights could not be fetched.
    """
    check_lpips(source)
    if source == FETCH:
        return LPIPS(fetch_weights(ALEXNET, "AlexNet's weights for LPIPS"))
    try:
        weights = torch.load(Path(source).expanduser(), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{source} holds no weights that torch can read; give {ALEXNET.rpartition('/')[2]}."
        ) from error
    return LPIPS(weights if isinstance(weights, dict) else {})


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at each place."""
    # the constant that the weights of the channels were fitted with in torchmetrics
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
