"""Encoders of prompts and pictures, each run by one rank of a pipeline, which sends what comes out to the others.

A pipeline calls its encoders one after another and uses each one's output at once, so that a rank that does not run one
has nothing to do meanwhile: what is gained is memory, not time. A rank holds the weights of its own text and image
encoders alone, and the ranks share them out by size. The encoder of the autoencoder is run by one rank as well; its
weights are few, and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.hooks import Run, install, uninstall
from asyncdiff_pl.parallel.sending import from_rank
from asyncdiff_pl.parallel.weights import HeldWeights, device_of_rank


class SharedEncoding:
    """Shares out a pipeline's encoders over its ranks, which all must call them, with the same inputs.

    Args:
        pipe: A diffusers pipeline.
        exchange: Messages of this rank.
        rank: Number of this rank in its pipeline.
        num_ranks: Ranks of the pipeline.
    """

    def __init__(self, pipe: Any, exchange: Exchange, rank: int, num_ranks: int) -> None:
        self._exchange = exchange
        self._rank = rank
        encoders = encoders_of(pipe)
        others = _encoder_of_pictures(pipe)
        sizes = {name: size_of(encoder) for name, encoder in encoders.items()} | dict.fromkeys(others, 0)
        self.owners = share_out(sizes, num_ranks)
        """Rank that runs each encoder, by name."""
        self._held: list[HeldWeights] = []
        self._handles = []
        for name, encoder in encoders.items():
            held = HeldWeights(encoder, device_of_rank(encoder))
            self._held.append(held)
            if self.owners[name] == rank:
                held.bring(encoder.parameters())
                continue
            held.take_away(encoder.parameters())
            parts = [part for part in encoder.modules() if part is not encoder]
            self._handles += [part.register_forward_pre_hook(_refuse) for part in parts]
        self._encoders = [*encoders.values(), *others.values()]
        for name, encoder in (encoders | others).items():
            install(encoder, self._run_by(self.owners[name], encoder))

    def remove(self) -> None:
        """Gives all encoders and their weights back."""
        for encoder in self._encoders:
            uninstall(encoder)
        for handle in self._handles:
            handle.remove()
        for held in self._held:
            held.remove()

    def _run_by(self, owner: int, encoder: nn.Module) -> Run:
        def run(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = forward(*args, **kwargs) if owner == self._rank else None
            device = next(encoder.parameters()).device
            return from_rank(self._exchange, output, owner, self._rank, device)

        return run


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's encoders of texts and of pictures, by name; a bare denoiser has none."""
    return {
        name: part
        for name, part in vars(pipe).items()
        if isinstance(part, nn.Module) and name.startswith(("text_encoder", "image_encoder"))
    }


def _encoder_of_pictures(pipe: Any) -> dict[str, nn.Module]:
    """The part of a pipeline's autoencoder that makes latents, which are drawn from what it says on each rank."""
    encoder = getattr(getattr(pipe, "vae", None), "encoder", None)
    return {"vae.encoder": encoder} if isinstance(encoder, nn.Module) else {}


def size_of(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())


def share_out(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Who runs which encoder: the largest first, each by the rank that has least to hold so far.

    Args:
        sizes: Bytes that each encoder's owner alone holds, by name.
        num_ranks: Ranks of the pipeline.

    Returns:
        The rank of each. Among equals it is the last, since the first one also scores and writes.
    """
    held = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = min(range(num_ranks), key=lambda rank: (held[rank], -rank))
        held[owner] += sizes[name]
        owners[name] = owner
    return owners


def _refuse(module: nn.Module, args: tuple[Any, ...]) -> NoReturn:
    raise ValueError(
        f"share_encoding holds each encoder's weights on one rank, and a part of one ({type(module).__name__}) was "
        "called by itself on another rank, as `clip_skip` does; set share_encoding to false."
    )
