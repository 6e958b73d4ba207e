"""Captions as CLIP's text tower takes them, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer


class Tokenize:
    """Turns captions and changed captions into tokens of one length.

    Args:
        tokenizer: Of CLIP.
        context: Most tokens of a text.
        multiple: The length is the longest text's, rounded up to a multiple of this; `context` itself pads all texts to
            it, as pipelines do.
    """

    def __init__(self, tokenizer: CLIPTokenizer, context: int, multiple: int = 8) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.multiple = multiple

    def __call__(self, captions: Sequence[str], changed: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Tokens.

        Args:
            captions: B texts.
            changed: For each of them K texts.

        Returns:
            [B, L] and [B, K, L], int64.
        """
        texts = [*captions, *(text for texts in changed for text in texts)]
        rows = self.tokenizer(texts, truncation=True, max_length=self.context)["input_ids"]
        length = min(self.context, -(-max(map(len, rows)) // self.multiple) * self.multiple)
        padding = self.tokenizer.pad_token_id
        tokens = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
        changes = len(changed[0]) if changed else 0
        return tokens[: len(captions)], tokens[len(captions) :].view(len(captions), changes, length)
