"""Queries, keys and values of self-attention in one product, in compiled code.

All three are made of the same tokens. Of few tokens, as a rank has them in a patch or in half of a guidance batch, each
of the three products is too small for a GPU, and takes no less time than all three at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

NAMES = ("to_q", "to_k", "to_v")
"""Layers of an attention that are joined."""

ALIGNMENT = 8
"""Kernels of attention want their inputs to begin at multiples of 16 bytes."""


class JoinedProjections:
    """One self-attention's projections, whose weights lie one behind the other in memory while it is there.

    Code that is not compiled calls the three layers as before.

    Args:
        attention: The attention.
    """

    def __init__(self, attention: Attention) -> None:
        self.weight: torch.Tensor | None = None
        """[C of queries + C of keys + C of values, C of tokens]; None while they are computed one by one."""
        self.bias: torch.Tensor | None = None
        """[C of queries + C of keys + C of values], if they have one."""
        self.sizes = [getattr(attention, name).out_features for name in NAMES]
        """C of queries, of keys and of values."""
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        """Within a call: tokens, and what was made of them."""
        self._layers: list[nn.Linear] = [getattr(attention, name) for name in NAMES]
        self._replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
        for at, layer in enumerate(self._layers):
            self._replace(layer, self._projection(at, layer.forward))
        self._replace(attention, self._whole(attention.forward))

    def join(self, device: torch.device) -> None:
        """Has the weights lie one behind the other, if they are on a device and may; else leaves or gives up doing so.

        Args:
            device: Where the denoiser computes.
        """
        if self._are_joined():
            return
        self._give_up()
        weights, biases = [[getattr(each, name) for each in self._layers] for name in ("weight", "bias")]
        if not _can_join(weights, device) or not (biases == [None] * 3 or _can_join(biases, device)):
            return
        self.weight = _one_behind_the_other(weights)
        self.bias = None if biases[0] is None else _one_behind_the_other(biases)

    def look_again(self) -> None:
        """Computes the three one by one again if one of them got another weight."""
        if not self._are_joined():
            self._give_up()

    def remove(self) -> None:
        """Gives the layers their own forwards back, and weights of their own."""
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:
                del module.forward
        if self._are_joined():
            for layer in self._layers:
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.clone()
        self._give_up()

    def are_all_of(self, attention: Attention) -> bool:
        """Whether an attention has these projections and nothing besides: no adapter's layers, no hooks on them."""
        found = [getattr(attention, name) for name in NAMES]
        has_hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in found)
        return not has_hooks and all(each is layer for each, layer in zip(found, self._layers, strict=True))

    def keys_and_values(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Both of each token side by side, in compiled code; None while they are computed one by one.

        Args:
            tokens: [..., C].
        """
        made = self._make(tokens)
        return None if made is None else made[..., self.sizes[0] :]

    def _make(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The product, once for all three."""
        if self.weight is None or not torch.compiler.is_compiling():
            return None
        if self._made is None or self._made[0] is not tokens:
            self._made = tokens, nn.functional.linear(tokens, self.weight, self.bias)
        return self._made[1]

    def _projection(self, at: int, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(tokens: torch.Tensor) -> torch.Tensor:
            made = self._make(tokens)
            return own(tokens) if made is None else made.split(self.sizes, -1)[at]

        return forward

    def _whole(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            # compiled code would return what is kept
            self._made = None
            return result

        return forward

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._replaced.append((module, forward))

    def _are_joined(self) -> bool:
        return all(
            joined is not None and _lie_in(joined, [getattr(layer, name) for layer in self._layers])
            for name, joined in (("weight", self.weight), ("bias", self.bias))
            if name == "weight" or self._layers[0].bias is not None
        )

    def _give_up(self) -> None:
        self.weight = self.bias = None


def joinable_attentions(denoiser: nn.Module) -> Iterator[Attention]:
    """Attentions of tokens to one another whose projections are plain layers."""
    for module in denoiser.modules():
        if not isinstance(module, Attention) or module.is_cross_attention or module.fused_projections:
            continue
        layers = [getattr(module, name, None) for name in NAMES]
        # layers of adapters and of quantised weights are other classes
        is_plain = all(type(layer) is nn.Linear and "forward" not in vars(layer) for layer in layers)
        if is_plain and all(layer.out_features % ALIGNMENT == 0 for layer in layers):
            yield module


def _can_join(parameters: list[nn.Parameter | None], device: torch.device) -> bool:
    """Whether parameters of equal form are plain tensors of a device, with memory of their own."""
    first = parameters[0]
    return all(
        type(each) is nn.Parameter
        and type(each.data) is torch.Tensor
        and each.device.type == device.type
        # placeholders of another rank's weights have one element in memory
        and each.is_contiguous()
        and first is not None
        and (each.dtype, each.device, each.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for each in parameters
    )


def _one_behind_the_other(parameters: list[nn.Parameter]) -> torch.Tensor:
    # tensors made in inference mode could not be changed outside of it
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([each.data for each in parameters])
        for each, part in zip(parameters, joined.split([len(each) for each in parameters]), strict=True):
            each.data = part
    return joined


def _lie_in(joined: torch.Tensor, parameters: list[nn.Parameter | None]) -> bool:
    place = joined.data_ptr()
    for each in parameters:
        if each is None or each.data_ptr() != place or each.dtype != joined.dtype or 0 in each.stride():
            return False
        place += each.numel() * each.element_size()
    return True
