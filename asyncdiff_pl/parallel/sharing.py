"""Decoding on all ranks of a pipeline: chunks of a video's frames, or the pictures of a batch, some on each rank.

What is decoded at once is never split, since how a batch is cut changes roundings: each rank makes to the bit what one
rank alone makes of its share. A decoder of videos blends the frames of a chunk into one another; there a chunk is what
the pipeline says. Pictures are decoded one by one, also where one rank has them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.sending import from_rank

_METHOD = "decode_latents"
_CHUNK = "decode_chunk_size"
_COUNT = "num_frames"
_FORM = "return_dict"


class _Replaced:
    """A method of an object, with a function in its place.

    Args:
        owner: The object.
        name: Name of the method.
        function: What is called instead.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._function = function
        self._own = vars(owner).get(name)
        self.call = getattr(owner, name)
        """The method itself."""
        self.signature = inspect.signature(self.call)
        setattr(owner, name, function)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the method is called with, by name."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def remove(self) -> None:
        """Gives the object its method back, unless somebody else replaced it since."""
        if vars(self._owner).get(self._name) is not self._function:
            return
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)


class SharedFrames:
    """Shares out `pipe.decode_latents` over the ranks of a pipeline, which all must call it, with the same latents.

    Chunk k is decoded by rank k modulo the number of ranks, and all ranks get all frames. With one chunk there is
    nothing to share: each rank decodes it, as before.

    Args:
        pipe: A diffusers pipeline that `decodes_frames`.
        exchange: Messages of this rank.
        rank: Number of this rank in its pipeline.
        num_ranks: Ranks of the pipeline.
    """

    def __init__(self, pipe: Any, exchange: Exchange, rank: int, num_ranks: int) -> None:
        self._pipe = pipe
        self._exchange = exchange
        self._rank = rank
        self._num_ranks = num_ranks
        self._method = _Replaced(pipe, _METHOD, self._decode)

    def remove(self) -> None:
        """Gives the pipeline its method back."""
        self._method.remove()

    def _decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes the method's arguments; gives [videos, channels, frames, height, width] in float32, on all ranks."""
        given = self._method.arguments(args, kwargs)
        latents = self._frames_second(given["latents"])
        # without a size all are decoded at once
        chunks = latents.flatten(0, 1).split(given[_CHUNK] or latents.shape[:2].numel())
        if len(chunks) == 1:
            return self._method.call(**given)
        config, scale = self._pipe.vae.config, self._pipe.vae_scale_factor
        height, width = (scale * size for size in latents.shape[-2:])
        frames = [
            torch.empty((len(chunk), config.out_channels, height, width), dtype=torch.float32, device=latents.device)
            for chunk in chunks
        ]
        # all of its own first: a message in between would hold up what can be computed at once
        for at in range(self._rank, len(chunks), self._num_ranks):
            own = {"latents": self._frames_second(chunks[at][None]), _COUNT: len(chunks[at])}
            decoded = self._method.call(**given | {name: value for name, value in own.items() if name in given})
            frames[at].copy_(decoded[0].transpose(0, 1))
        for at, tensor in enumerate(frames):
            self._exchange.broadcast([tensor], at % self._num_ranks)
        return torch.cat(frames).unflatten(0, latents.shape[:2]).transpose(1, 2)

    def _frames_second(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with frames before channels, where the pipeline has them behind; and the reverse."""
        return latents if _COUNT in self._method.signature.parameters else latents.transpose(1, 2)


class SharedPictures:
    """Has each picture of a batch decoded by itself, and by one rank of a pipeline for all.

    Picture k is decoded by rank k modulo the number of ranks, which all must call `vae.decode` with the same latents.
    The bits do not depend on the number of ranks. They are those of the autoencoder after `enable_slicing()`; a batch
    that is decoded at once differs from them in roundings: on a CPU by about 1e-5 of the norm in float32, 3e-3 in
    float16.

    Args:
        vae: An autoencoder that `decodes_pictures`.
        exchange: Messages of this rank; None where it has no others.
        rank: Number of this rank in its pipeline.
        num_ranks: Ranks of the pipeline.
    """

    def __init__(self, vae: Any, exchange: Exchange | None = None, rank: int = 0, num_ranks: int = 1) -> None:
        self._exchange = exchange
        self._rank = rank
        self._num_ranks = num_ranks
        self._method = _Replaced(vae, "decode", self._decode)
        self._latents = next(iter(self._method.signature.parameters))

    def remove(self) -> None:
        """Gives the autoencoder its method back."""
        self._method.remove()

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the method's arguments and gives what it gives, on all ranks."""
        given = self._method.arguments(args, kwargs)
        latents = given[self._latents].split(1)
        if len(latents) == 1:
            return self._method.call(**given)
        # all of its own first, as for frames
        pictures = {
            at: self._method.call(**given | {self._latents: latents[at], _FORM: False})[0]
            for at in range(self._rank, len(latents), self._num_ranks)
        }
        if self._exchange is not None:
            for at, latent in enumerate(latents):
                owner = at % self._num_ranks
                pictures[at] = from_rank(self._exchange, pictures.get(at), owner, self._rank, latent.device)
        decoded = torch.cat([pictures[at] for at in range(len(latents))])
        return DecoderOutput(sample=decoded) if given[_FORM] else (decoded,)


def shared_decoding(
    pipe: Any, exchange: Exchange | None, rank: int, num_ranks: int
) -> list[SharedFrames | SharedPictures]:
    """Shares out what a pipeline decodes.

    Args:
        pipe: A diffusers pipeline, or a bare denoiser.
        exchange: Messages of this rank; None where it has no others.
        rank: Number of this rank in its pipeline.
        num_ranks: Ranks of the pipeline.

    Returns:
        What was installed, and has a `remove`; nothing where a pipeline decodes in another way.
    """
    if decodes_frames(pipe):
        return [] if exchange is None else [SharedFrames(pipe, exchange, rank, num_ranks)]
    vae = getattr(pipe, "vae", None)
    return [SharedPictures(vae, exchange, rank, num_ranks)] if decodes_pictures(vae) else []


def decodes_frames(pipe: Any) -> bool:
    """Whether a pipeline decodes frames in chunks, in a method of its own, as SVD's and AnimateDiff's do."""
    method = getattr(pipe, _METHOD, None)
    # a further argument could be about all frames
    return method is not None and set(inspect.signature(method).parameters) - {_COUNT} == {"latents", _CHUNK}


def decodes_pictures(vae: Any) -> bool:
    """Whether an autoencoder decodes the pictures, or clips, of a batch independently of one another."""
    # diffusers says so of those that it can slice
    if not hasattr(vae, "use_slicing"):
        return False
    _, *others = inspect.signature(vae.decode).parameters
    # a further argument could be about all pictures
    return _FORM in others and set(others) <= {_FORM, "generator"}
