"""Cross-attention of a denoiser without what is the same in each step.

Texts do not change while a sample is denoised, so neither do the keys and values that cross-attention makes of them:
they are computed once a sample. And a query that sees one single token, as in Stable Video Diffusion, gives it all of
its attention: the result is that token's value, for all queries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.utils._pytree import tree_map_only

from asyncdiff_pl.parallel.arguments import Arguments, Inputs
from asyncdiff_pl.parallel.capture import may_capture
from asyncdiff_pl.parallel.phases import number_format
from asyncdiff_pl.parallel.stages.units import meta_twin

CONTEXT = "encoder_hidden_states"
"""The denoiser's argument with what all cross-attention may see."""

BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock)
"""Blocks that add the result of their cross-attention to their tokens, so that one for all tokens will do."""


class SteadyAttention:
    """An attention processor that gives what diffusers' own gives.

    Args:
        own: The one in whose place it stands.
        sees_one: Whether attention to a single token is that token's value: exact, but for the rounding of a product of
            another size.
    """

    def __init__(self, own: AttnProcessor2_0, sees_one: bool) -> None:
        self.own = own
        self.sees_one = sees_one
        self.key: torch.Tensor | None = None
        """Keys of the sample in work, [B, T, C]; None to compute them."""
        self.value: torch.Tensor | None = None
        """Its values, likewise."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of tokens to a context.

        Args:
            attn: Its projections.
            hidden_states: Tokens, [B, N, C].
            encoder_hidden_states: The context, [B, T, C'].
            attention_mask: What is not to be seen.
            temb: Time embedding, of which it makes nothing.

        Returns:
            [B, N, C], or [B, 1, C] where it is the same for all tokens.
        """
        if encoder_hidden_states is None or attention_mask is not None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.sees_one and encoder_hidden_states.shape[1] == 1:
            return _out(attn, attn.to_v(encoder_hidden_states))
        key, value = self.key, self.value
        if key is None or value is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        query, key, value = (_heads(tokens, attn.heads) for tokens in (attn.to_q(hidden_states), key, value))
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return _out(attn, seen.transpose(1, 2).flatten(2).to(query.dtype))


class CrossAttentions:
    """Puts `SteadyAttention` into a denoiser whose steps are compiled or recorded, and keeps its keys and values.

    Args:
        denoiser: The network, without hooks or joined projections so far.
        forward: Its own forward, whose signature names the arguments.
        is_compiled: Whether it is compiled, and rounds in its own way already: then a single token is its own result.
        capture: Whether its steps are recorded; None for where there is an NVIDIA GPU.
        twin: It on the meta device, where there is one already.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        forward: Callable[..., Any],
        is_compiled: bool,
        capture: bool | None,
        twin: nn.Module | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._is_compiled = is_compiled
        self._twin = (twin or meta_twin(denoiser)) if is_compiled or may_capture(capture) else None
        self._arguments = Arguments(forward)
        self._layers: dict[str, tuple[Attention, SteadyAttention]] = {}
        self._kept: dict[Hashable, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._seeing: dict[Hashable, frozenset[str]] = {}
        self._context: torch.Tensor | None = None
        self._known: Hashable = None

    def look(self, kind: Hashable, inputs: Inputs, is_recorded: bool) -> None:
        """Finds out which layers see the denoiser's own argument, for inputs of a kind.

        Args:
            kind: Tells the kind from others.
            inputs: Arguments of a call.
            is_recorded: Whether such calls are recorded.
        """
        if self._twin is None or not (self._is_compiled or is_recorded):
            return
        if not self._layers:
            self._install()
        seen: set[str] = set()
        moved: dict[int, torch.Tensor] = {}

        def to_meta(tensor: torch.Tensor) -> torch.Tensor:
            return moved.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))

        def note(name: str, kwargs: dict[str, Any]) -> None:
            if context is not None and kwargs.get(CONTEXT) is moved.get(id(context)):
                seen.add(name)

        args, kwargs = tree_map_only(torch.Tensor, to_meta, inputs)
        context = self._context_of(inputs)
        hooks = [
            self._twin.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: note(name, kwargs), with_kwargs=True
            )
            for name in self._layers
        ]
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._twin(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            # a network that does not run on the meta device, as one with distributed tensors, keeps what it has
            seen.clear()
        for hook in hooks:
            hook.remove()
        self._seeing[kind] = frozenset(seen)

    def begin_sample(self) -> None:
        """Has keys and values computed anew: the network may be another one."""
        self._known = None

    def follow(self, kind: Hashable, inputs: list[Inputs]) -> None:
        """Gives the layers the keys and values of a call's context.

        Args:
            kind: The inputs' kind; nothing happens if it was not looked at.
            inputs: Arguments of the denoiser calls of a step. Of several, each has a context of its own, and the layers
                compute what they need themselves.
        """
        if kind not in self._seeing:
            return
        # scales of adapters among these arguments hold within the denoiser's call alone
        is_plain = len(inputs) == 1 and not self._arguments.find(inputs[0], "cross_attention_kwargs")
        context = self._context_of(inputs[0]) if is_plain else None
        if context is None:
            for _, processor in self._layers.values():
                processor.key = processor.value = None
            self._known = None
            return
        # tensors made in inference mode count no versions, and pipelines replace texts, not what is in them
        version = None if context.is_inference() else context._version
        form = (context.shape, context.dtype, context.device, number_format(context.device), self._seeing[kind])
        known = (form, context.data_ptr(), context.stride(), version)
        if known == self._known:
            return
        # held, so that no other tensor comes to its address
        self._known, self._context = known, context
        self._compute(context, self._seeing[kind], self._kept.setdefault(form, {}))

    def remove(self) -> None:
        """Gives the layers their own processors back."""
        for layer, processor in self._layers.values():
            if layer.processor is processor:
                layer.processor = processor.own

    def _install(self) -> None:
        for name, layer in _plain_layers(self._denoiser):
            processor = SteadyAttention(layer.processor, self._is_compiled)
            layer.processor = processor
            self._layers[name] = layer, processor

    @torch.no_grad()
    def _compute(
        self, context: torch.Tensor, names: frozenset[str], kept: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        for name, (layer, processor) in self._layers.items():
            processor.key = processor.value = None
            # those of other stages have no weights in a relay
            if name not in names or layer.processor is not processor or _is_elsewhere(layer.to_k):
                continue
            made = layer.to_k(context), layer.to_v(context)
            if name not in kept:
                # recordings know them by their place; made in inference mode, they could not be changed outside it
                with torch.inference_mode(False):
                    kept[name] = torch.empty_like(made[0]), torch.empty_like(made[1])
            for place, tensor in zip(kept[name], made, strict=True):
                place.copy_(tensor)
            processor.key, processor.value = kept[name]

    def _context_of(self, inputs: Inputs) -> torch.Tensor | None:
        found = self._arguments.find(inputs, CONTEXT)
        return found if isinstance(found, torch.Tensor) else None


def _plain_layers(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Cross-attention as `AttnProcessor2_0` computes it, with nothing besides."""
    for parent, block in denoiser.named_modules():
        layer = getattr(block, "attn2", None) if isinstance(block, BLOCKS) else None
        if not isinstance(layer, Attention) or type(layer.processor) is not AttnProcessor2_0:
            continue
        parts = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
        is_plain = all(part is None for part in parts) and not layer.residual_connection
        if layer.is_cross_attention and is_plain and layer.rescale_output_factor == 1:
            yield f"{parent}.attn2", layer


def _is_elsewhere(layer: nn.Module) -> bool:
    return any(0 in weight.stride() for weight in layer.parameters())


def _heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] as [B, heads, N, C / heads]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _out(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    for layer in attn.to_out:
        tokens = layer(tokens)
    return tokens
