"""DDPM's U-Net as diffusers has it, and the first weights that its authors give it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def build_unet(
    size: int,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: Sequence[int] = (16,),
    dropout: float = 0.1,
    learns_variance: bool = False,
) -> UNet2DModel:
    """Builds the U-Net of Ho et al. (2020), "Denoising Diffusion Probabilistic Models", appendix B.

    With its defaults it is theirs for CIFAR-10: 35.7 million weights.

    Args:
        size: Height and width of the pictures, in pixels.
        channels: Channels of the first level.
        multipliers: For each level its channels, as multiples of the first's; each level is half as high as the one
            before.
        blocks: Residual blocks of a level.
        attention: Heights of the levels that have attention, in pixels; the middle always has.
        dropout: Share of values that each residual block drops in training.
        learns_variance: Give twice as many channels: the prediction, then the variances.

    Raises:
        ValueError: The size cannot be halved so often, or no level has a height that attention is asked for.
    """
    sizes = [size >> level for level in range(len(multipliers))]
    if not multipliers or size % (1 << (len(multipliers) - 1)):
        raise ValueError(
            f"size is {size} pixels, and {len(multipliers)} levels halve it {len(multipliers) - 1} times; give a "
            f"multiple of {1 << max(0, len(multipliers) - 1)}, or other multipliers."
        )
    if not set(attention) <= set(sizes):
        raise ValueError(f"attention is {[*attention]}, but the levels are {sizes} pixels high; give some of these.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a share from 0 to below 1.")
    has_attention = [height in attention for height in sizes]
    network = UNet2DModel(
        sample_size=size,
        out_channels=6 if learns_variance else 3,
        block_out_channels=tuple(channels * factor for factor in multipliers),
        layers_per_block=blocks,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in has_attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
        dropout=dropout,
        attention_head_dim=None,
        norm_num_groups=math.gcd(32, channels),
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    _initialise(network)
    return network


def _initialise(network: UNet2DModel) -> None:
    """Draws the weights of all layers by Glorot's rule; what ends a branch or the network is 0, and all biases are."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    last: list[nn.Module] = [network.conv_out]
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        elif isinstance(module, Attention):
            last.append(module.to_out[0])
    for module in last:
        nn.init.zeros_(module.weight)
