"""How well pictures fit captions: 100 x the cosine of their embeddings (CLIPScore, Hessel et al. 2021, eq. 1).

As AsyncDiff's evaluation has it: each frame against each caption, the mean over the captions and then over the frames,
scaled by 100 and not clamped at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class TextImageScore(nn.Module):
    """Scores pictures against captions with a two-tower model such as CLIP.

    Args:
        model: Has `get_image_features(pixel_values=...)` and `get_text_features(input_ids=..., attention_mask=...)`.
        processor: Turns pictures into `pixel_values` and texts into tokens, as transformers' `CLIPProcessor` does.
        batch_size: Frames in one forward pass of the image tower.
    """

    def __init__(self, model: nn.Module, processor: Any, batch_size: int = 16) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a number of frames from 1 up.")
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.batch_size = batch_size

    @override
    def forward(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Score of the frames as a whole.

        Args:
            frames: F pictures.
            captions: C texts.

        Returns:
            A float32 scalar from -100 to 100: the mean over all F x C pairs.
        """
        return self.pairs(frames, captions).mean(1).mean(0)

    def pairs(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Scores of each frame against each caption, [F, C], float32, from -100 to 100."""
        if not frames or not captions:
            raise ValueError(f"A score needs frames and captions; given are {len(frames)} and {len(captions)}.")
        return 100 * self.embed_images(frames) @ self.embed_texts(captions).T

    @torch.no_grad()
    def embed_images(self, frames: Sequence[Image.Image]) -> Tensor:
        """Embeddings of F pictures as unit vectors, [F, D], float32."""
        parameter = next(self.model.parameters())
        parts = []
        for start in range(0, len(frames), self.batch_size):
            images = [frame.convert("RGB") for frame in frames[start : start + self.batch_size]]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
            parts.append(
                _unit(self.model.get_image_features(pixel_values=pixels.to(parameter.device, parameter.dtype)))
            )
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of C texts as unit vectors, [C, D], float32; what exceeds the model's length is cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest
        )
        device = next(self.model.parameters()).device
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
        return _unit(features)


def _unit(features: Any) -> Tensor:
    # a tensor up to transformers 4, an output object from 5 on
    features = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(features.float(), dim=-1)
