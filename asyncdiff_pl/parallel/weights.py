"""Which weights of a module a rank holds where it computes; the others stay in the host's memory.

A placeholder stands in for a weight that is left there: a tensor of the same shape, number format and device that has
one element in memory, so that what asks a network for its device, its number format or its number of weights gets the
right answer. Placeholders are NaN: a use of one would show.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class HeldWeights:
    """Takes weights of a module away and brings them back; its buffers, which are small, are brought at once.

    Args:
        module: The module.
        device: Where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._before = {weight: weight.device for weight in module.parameters()}
        """Where each weight was."""
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        """What placeholders stand for."""
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = _move_buffers(module, device)
        self._handle = module.register_state_dict_post_hook(functools.partial(_put_into, self._kept))

    def take_away(self, weights: Iterable[nn.Parameter]) -> None:
        """Leaves weights on the host, behind placeholders."""
        with torch.inference_mode(False), torch.no_grad():
            for weight in weights:
                if weight in self._kept:
                    continue
                self._kept[weight] = weight.data.cpu()
                one, value = (1,) * weight.ndim, float("nan") if weight.is_floating_point() else 0
                weight.data = torch.full(one, value, dtype=weight.dtype, device=self._device).expand(weight.shape)
        if self._device.type == "cuda":
            # what weights took that were there before is for activations and for others
            torch.cuda.empty_cache()

    def bring(self, weights: Iterable[nn.Parameter]) -> None:
        """Brings weights to where the module computes."""
        with torch.inference_mode(False), torch.no_grad():
            for weight in weights:
                if weight in self._kept or weight.device != self._device:
                    weight.data = self._kept.pop(weight, weight.data).to(self._device)

    def remove(self) -> None:
        """Gives all weights and buffers back, each where it was."""
        self._handle.remove()
        with torch.inference_mode(False), torch.no_grad():
            for weight, device in self._before.items():
                weight.data = self._kept.get(weight, weight.data).to(device)
            for module, name, buffer in self._buffers:
                setattr(module, name, buffer)
        self._kept.clear()


def _put_into(
    kept: dict[nn.Parameter, torch.Tensor], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Saves the weights themselves, not their placeholders."""
    for name, weight in module.named_parameters(remove_duplicate=False):
        if weight in kept and prefix + name in state:
            state[prefix + name] = kept[weight]


def _move_buffers(module: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Moves all buffers.

    Returns:
        Those that were elsewhere: module, name and tensor.
    """
    moved = []
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.device != device:
                moved.append((part, name, buffer))
                setattr(part, name, buffer.to(device))
    return moved


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


def device_of_rank(module: nn.Module) -> torch.device:
    """Where a rank computes: where a module is, or on this process's GPU if it is to be brought there yet."""
    device = next(module.parameters()).device
    # ranks with NCCL have a GPU each, and messages travel from there
    if device.type == "cpu" and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return device
