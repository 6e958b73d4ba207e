"""What a recording of a network would keep of it, in one number: so that a change between two samples is seen.

A replay reads weights where they lay when it was recorded. Weights that were changed in place are seen by themselves;
weights that were replaced, adapters that were loaded, scaled or merged, attention processors, FreeU and the like are
not: they are other addresses, other modules, or numbers that became part of kernels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

_PLAIN = frozenset({bool, int, float, str})
_NESTED = frozenset({list, tuple, set, dict})
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def fingerprint(network: nn.Module) -> int:
    """A number that is another one when what the network computes may be, for the same inputs and tensors in place.

    It counts the modules, their kinds, their hooks, the plain numbers and texts that they keep (also in lists and
    dictionaries, as adapters keep their scales), their attention processors, and where their tensors lie.

    Args:
        network: The network.
    """
    found: list[Hashable] = []
    _describe(network, found)
    return hash(tuple(found))


def _describe(module: nn.Module, found: list[Hashable]) -> None:
    attributes = vars(module)
    kind = type(module)
    found.append(kind)
    for tensors in (attributes["_parameters"], attributes["_buffers"]):
        for tensor in tensors.values():
            if tensor is not None:
                found += (tensor.data_ptr(), tensor.dtype, hash(tensor.stride()))
    if not kind.__module__.startswith("torch."):
        # what torch's own layers keep beside their tensors does not change
        found += (*attributes["_forward_hooks"], *attributes["_forward_pre_hooks"])
        _describe_plain(attributes, found)
        processor = attributes.get("processor")
        if processor is not None:
            found.append(type(processor))
            _describe_plain(vars(processor), found)
    for child in attributes["_modules"].values():
        if child is not None:
            _describe(child, found)


def _describe_plain(attributes: dict[str, Any], found: list[Hashable]) -> None:
    for name, value in attributes.items():
        kind = type(value)
        if kind in _PLAIN:
            found += (name, value)
        elif kind in _NESTED and value and name not in _OF_TORCH:
            values = (*value, *value.values()) if kind is dict else value
            found += (name, *(each for each in values if type(each) in _PLAIN))
