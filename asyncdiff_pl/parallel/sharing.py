"""Decoding a video on all ranks of a pipeline, some chunks of its frames on each.

A decoder of videos blends the frames of a chunk into one another, so that a chunk is never split: each frame is what
one rank alone would make of it, to the bit.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from asyncdiff_pl.parallel.exchange import Exchange

_METHOD = "decode_latents"
_CHUNK = "decode_chunk_size"
_COUNT = "num_frames"


class SharedDecoding:
    """Shares out `pipe.decode_latents` over the ranks of a pipeline, which all must call it, with the same latents.

    Chunk k is decoded by rank k modulo the number of ranks, and all ranks get all frames. With one chunk there is
    nothing to share: each rank decodes it, as before.

    Args:
        pipe: A diffusers pipeline that `can_share`.
        exchange: Messages of this rank.
        rank: Number of this rank in its pipeline.
        num_ranks: Ranks of the pipeline.
    """

    def __init__(self, pipe: Any, exchange: Exchange, rank: int, num_ranks: int) -> None:
        self._pipe = pipe
        self._exchange = exchange
        self._rank = rank
        self._num_ranks = num_ranks
        self._own = vars(pipe).get(_METHOD)
        self._method = getattr(pipe, _METHOD)
        self._signature = inspect.signature(self._method)
        # bound once, so that it can be told from what others put in its place
        self._shared = self._decode
        setattr(pipe, _METHOD, self._shared)

    def remove(self) -> None:
        """Gives the pipeline its method back, unless somebody else replaced it since."""
        if vars(self._pipe).get(_METHOD) is not self._shared:
            return
        if self._own is None:
            delattr(self._pipe, _METHOD)
        else:
            setattr(self._pipe, _METHOD, self._own)

    def _decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes the method's arguments; gives [videos, channels, frames, height, width] in float32, on all ranks."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        latents = self._frames_second(given["latents"])
        # without a size all are decoded at once
        chunks = latents.flatten(0, 1).split(given[_CHUNK] or latents.shape[:2].numel())
        if len(chunks) == 1:
            return self._method(**given)
        config, scale = self._pipe.vae.config, self._pipe.vae_scale_factor
        height, width = (scale * size for size in latents.shape[-2:])
        frames = [
            torch.empty((len(chunk), config.out_channels, height, width), dtype=torch.float32, device=latents.device)
            for chunk in chunks
        ]
        # all of its own first: a message in between would hold up what can be computed at once
        for at in range(self._rank, len(chunks), self._num_ranks):
            own = {"latents": self._frames_second(chunks[at][None]), _COUNT: len(chunks[at])}
            decoded = self._method(**given | {name: value for name, value in own.items() if name in given})
            frames[at].copy_(decoded[0].transpose(0, 1))
        for at, tensor in enumerate(frames):
            self._exchange.broadcast([tensor], at % self._num_ranks)
        return torch.cat(frames).unflatten(0, latents.shape[:2]).transpose(1, 2)

    def _frames_second(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with frames before channels, where the pipeline has them behind; and the reverse."""
        return latents if _COUNT in self._signature.parameters else latents.transpose(1, 2)


def can_share(pipe: Any) -> bool:
    """Whether a pipeline decodes frames in chunks, in a method of its own, as SVD's and AnimateDiff's do."""
    method = getattr(pipe, _METHOD, None)
    # a further argument could be about all frames
    return method is not None and set(inspect.signature(method).parameters) - {_COUNT} == {"latents", _CHUNK}
