"""The weights that a rank holds where it computes: those of its own stage, and those that belong to no unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.weights import HeldWeights


class Placement:
    """Places a denoiser's weights for one stage, and gives them back.

    Weights that are not on the device yet wait for the cut on the host, and only the own stage's ever get there.

    Args:
        denoiser: The network.
        pieces: The modules that may be units, by name.
        device: Where the denoiser computes.
    """

    def __init__(self, denoiser: nn.Module, pieces: Mapping[str, nn.Module], device: torch.device) -> None:
        self.device = device
        self._pieces = pieces
        self._foreign: set[str] = set()
        self._held = HeldWeights(denoiser, device)
        in_pieces = {weight for piece in pieces.values() for weight in piece.parameters()}
        self._held.bring(weight for weight in denoiser.parameters() if weight not in in_pieces)
        self._held.take_away(weight for weight in in_pieces if weight.device != device)

    def place(self, program: Program, stage: int) -> None:
        """Places the weights of a stage.

        Args:
            program: The denoiser's cut; where there are several, all cut alike.
            stage: The stage.
        """
        owners = {name: program.boundary.owner[number] for name, number in program.numbers.items()}
        # a call that leaves out some units changes nothing for those
        self._foreign |= {name for name, owner in owners.items() if owner != stage}
        own = {
            weight for name, piece in self._pieces.items() if name not in self._foreign for weight in piece.parameters()
        }
        foreign = {weight for name in self._foreign for weight in self._pieces[name].parameters()}
        self._held.take_away(foreign - own)
        self._held.bring(own)

    def remove(self) -> None:
        """Gives all weights back, each where it was."""
        self._held.remove()
