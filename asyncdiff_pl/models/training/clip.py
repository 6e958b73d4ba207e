"""Trains CLIP: pictures and captions that belong together become similar, others do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from typing_extensions import override

from asyncdiff_pl.metrics.ranking import choose_others, ranks_first, ranks_first_among
from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.sources import read_json
from asyncdiff_pl.models.training.base import Batch, NetworkTraining
from asyncdiff_pl.models.training.components import new_network
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.tokens import Tokenize
from asyncdiff_pl.training.contrastive import contrastive_loss
from asyncdiff_pl.training.pictures import disturb, normalise, resize_as_processor, resize_as_svd

HIGHEST_SCALE = 4.6052
"""Logarithm of 100, the most that similarities are multiplied by."""

NUM_OTHERS = 100
"""Captions of other pictures that the true one is ranked among, in validation."""

PROCESSOR_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json")


class CLIPTraining(NetworkTraining):
    """Trains CLIP on first frames and their captions, with changed captions as further wrong texts of each picture.

    Args:
        architecture: A folder with the config.json of a `CLIPModel`, its tokenizer and its processor, or the name of a
            component of the package.
        optimizer: How the weights follow the gradients.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported, or the name of a component; null draws new ones.
    """

    def __init__(
        self,
        architecture: str = "scene-clip",
        optimizer: Optimizer = Optimizer(weight_decay=0.05, beta2=0.98),
        compile: bool = False,
        start_from: str | None = None,
    ) -> None:
        network = new_network(CLIPModel, architecture)
        super().__init__(network, optimizer, compile, start_from)
        self.folder = find_component(architecture)
        tokenizer = CLIPTokenizer.from_pretrained(self.folder)
        self.tokenize = Tokenize(tokenizer, network.config.text_config.max_position_embeddings)
        processor = read_json(self.folder, "preprocessor_config.json", "a CLIP model's folder")
        self.register_buffer("mean", torch.tensor(processor["image_mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(processor["image_std"]), persistent=False)
        self._embedded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._captions: list[str] = []

    def embed_pictures(self, pictures: Tensor, as_svd: bool = False) -> Tensor:
        """Embeddings of unit length [B, D] of pictures [B, 3, H, W], pixels from 0 to 1.

        Args:
            pictures: The pictures.
            as_svd: Resize as the video pipeline does, otherwise as CLIP's processor does.
        """
        size = self.network.config.vision_config.image_size
        resized = (resize_as_svd if as_svd else resize_as_processor)(pictures, size)
        pooled = self.network.vision_model(pixel_values=normalise(resized, self.mean, self.std)).pooler_output
        return F.normalize(self.network.visual_projection(pooled).float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings of unit length [B, D] of padded tokens [B, L]; what follows the first end does not count."""
        pooled = self.network.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.network.text_projection(pooled).float(), dim=-1)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        # both ways to resize, batch by batch: scores use one and the video pipeline the other
        images = self.embed_pictures(disturb(batch["frames"][:, 0]), as_svd=self.global_step % 2 == 1)
        tokens, changed_tokens = self._tokens(batch)
        texts = self.embed_tokens(torch.cat([tokens, changed_tokens.flatten(0, 1)]))
        texts, changed = texts[: len(tokens)], texts[len(tokens) :].unflatten(0, changed_tokens.shape[:2])
        scale = self.network.logit_scale.clamp(max=HIGHEST_SCALE).exp()
        also_true = None
        if "caption_label" in batch:
            also_true = batch["label"][:, None] == batch["caption_label"][None, :]
        # similarities of 16 bits would be too rough
        with torch.autocast(self.device.type, enabled=False):
            loss = contrastive_loss(images, texts, scale, changed if changed.shape[1] else None, also_true)
        return {"loss": loss, "scale": scale}

    @override
    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        tokens, changed_tokens = self._tokens(batch)
        images, texts = self.embed_pictures(batch["frames"][:, 0]), self.embed_tokens(tokens)
        changed = self.embed_tokens(changed_tokens.flatten(0, 1)).unflatten(0, changed_tokens.shape[:2])
        self._embedded.append((images, texts, changed))
        self._captions += batch["captions"]
        # the measures need all pictures together: see on_validation_epoch_end
        return {}

    @override
    def on_validation_epoch_end(self) -> None:
        images, texts, changed = (torch.cat(parts) for parts in zip(*self._embedded, strict=True))
        number = min(NUM_OTHERS, len(set(self._captions)) - 1)
        if number:
            others = choose_others(self._captions, number).to(images.device)
            found = ranks_first_among(images @ texts.T, others)
            self.log(f"validation/first_of_{number + 1}", found.float().mean(), sync_dist=True)
        if changed.shape[1]:
            similarity = torch.einsum("bd,bkd->bk", images, torch.cat([texts[:, None], changed], dim=1))
            found = ranks_first(similarity)
            self.log(f"validation/first_of_{changed.shape[1]}_changed", found.float().mean(), sync_dist=True)
        self._embedded, self._captions = [], []

    @override
    def pictures(self, batch: Batch) -> Tensor:
        shown = batch["frames"][:8, 0]
        return torch.stack([shown, disturb(shown)])

    @override
    def export(self, folder: Path) -> None:
        super().export(folder)
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, folder / name)
