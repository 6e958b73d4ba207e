"""The contrastive loss of CLIP, with texts that differ in one word from the true one as further negatives.

After Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision", figure 3; the
further negatives after Yuksekgonul et al. (2023), "When and Why Vision-Language Models Behave like Bags-Of-Words".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, changed: Tensor | None = None, also_true: Tensor | None = None
) -> Tensor:
    """Mean of two cross-entropies: each image finds its text among all texts, each text its image among all images.

    Args:
        images: [B, D], of unit length.
        texts: [B, D], of unit length; text i belongs to image i.
        scale: Scalar that similarities are multiplied by, 1 / temperature.
        changed: [B, K, D], of unit length: texts that are wrong for image i; only this image is asked about them.
        also_true: [B, B], bool: whether text j (column) also fits image i (row); such pairs off the diagonal do not
            count.

    Returns:
        The loss, a scalar.
    """
    similarities = scale * images @ texts.T
    if also_true is not None:
        others = ~torch.eye(len(images), dtype=torch.bool, device=images.device)
        similarities = similarities.masked_fill(also_true & others, -torch.inf)
    rows = similarities
    if changed is not None:
        rows = torch.cat([similarities, scale * torch.einsum("bd,bkd->bk", images, changed)], dim=1)
    truth = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(rows, truth) + F.cross_entropy(similarities.T, truth)) / 2
