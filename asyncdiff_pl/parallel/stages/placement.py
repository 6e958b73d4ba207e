"""The weights that a rank holds where it computes: those of its own stage, and those that belong to no unit.

A weight of another stage is left in the host's memory. A placeholder stands in for it: a tensor of the same shape,
number format and device that has one element in memory, so that what asks a network for its device, its number format
or its number of weights gets the right answer. Placeholders are NaN: a use of one would show.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from asyncdiff_pl.parallel.stages.program import Program


class Placement:
    """Places a denoiser's weights for one stage, and gives them back.

    Weights that are not on the device yet wait for the cut on the host, behind placeholders, and only the own stage's
    ever get there.

    Args:
        denoiser: The network.
        pieces: The modules that may be units, by name.
        device: Where the denoiser computes.
    """

    def __init__(self, denoiser: nn.Module, pieces: Mapping[str, nn.Module], device: torch.device) -> None:
        self.device = device
        self._denoiser = denoiser
        self._pieces = pieces
        self._foreign: set[str] = set()
        self._before = {weight: weight.device for weight in denoiser.parameters()}
        """Where each weight was."""
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        """What placeholders stand for."""
        in_pieces = {weight for piece in pieces.values() for weight in piece.parameters()}
        with torch.inference_mode(False), torch.no_grad():
            for weight in self._before:
                if weight not in in_pieces:
                    weight.data = weight.data.to(device)
                elif weight.device != device:
                    self._take_away(weight)
            self._buffers = _move_buffers(denoiser, device)
        self._handle = denoiser.register_state_dict_post_hook(functools.partial(_put_into, self._kept))

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
        with torch.inference_mode(False), torch.no_grad():
            for name in self._foreign:
                for weight in self._pieces[name].parameters():
                    if weight not in own and weight not in self._kept:
                        self._take_away(weight)
            for weight in own & set(self._kept):
                weight.data = self._kept.pop(weight).to(self.device)
        if self.device.type == "cuda":
            # what weights took that were there before is for activations and for others
            torch.cuda.empty_cache()

    def remove(self) -> None:
        """Gives all weights back, each where it was."""
        self._handle.remove()
        with torch.inference_mode(False), torch.no_grad():
            for weight, device in self._before.items():
                weight.data = self._kept.get(weight, weight.data).to(device)
            for module, name, buffer in self._buffers:
                setattr(module, name, buffer)
        self._kept.clear()

    def _take_away(self, weight: nn.Parameter) -> None:
        self._kept[weight] = weight.data.cpu()
        value = float("nan") if weight.is_floating_point() else 0
        weight.data = torch.full((1,) * weight.ndim, value, dtype=weight.dtype, device=self.device).expand(weight.shape)


def _put_into(
    kept: dict[nn.Parameter, torch.Tensor], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Saves the weights themselves, not their placeholders."""
    for name, weight in module.named_parameters(remove_duplicate=False):
        if weight in kept and prefix + name in state:
            state[prefix + name] = kept[weight]


@contextlib.contextmanager
def left_behind(whole: nn.Module, part: nn.Module) -> Iterator[None]:
    """Within this context a module can be moved without a part of it.

    Args:
        whole: What is moved.
        part: One of the modules below it, under whatever names.
    """
    places = [(module, name) for module in whole.modules() for name, child in module._modules.items() if child is part]
    for module, name in places:
        module._modules[name] = None
    try:
        yield
    finally:
        for module, name in places:
            module._modules[name] = part


def device_of_rank(denoiser: nn.Module) -> torch.device:
    """Where a rank computes: where its denoiser is, or on this process's GPU if that is to be brought there yet."""
    device = next(denoiser.parameters()).device
    # ranks with NCCL have a GPU each, and boundary tensors travel from there
    if device.type == "cpu" and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _move_buffers(denoiser: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Moves all buffers, which are small.

    Returns:
        Those that were elsewhere: module, name and tensor.
    """
    moved = []
    for module in denoiser.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                moved.append((module, name, buffer))
                setattr(module, name, buffer.to(device))
    return moved
