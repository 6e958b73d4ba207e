"""The guidance batch as an axis: each half of a call's arguments for one group of ranks.

Pipelines put the unconditional and the conditional half of classifier-free guidance behind one another in dimension 0
of every tensor that belongs to the batch. A denoiser that sees one half gives that half of the result, exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

PER_SAMPLE = frozenset(
    {
        "sample",
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_2",
        "encoder_hidden_states_t5",
        "encoder_hidden_states_image",
        "encoder_hidden_states_mask",
        "pooled_projections",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "encoder_attention_mask",
        "encoder_attention_mask_2",
        "text_embedding_mask",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "added_cond_kwargs",
        "added_time_ids",
        "guidance",
        "fps",
        "image_latents",
        "image_embeddings",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "block_controlnet_hidden_states",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    }
)
"""Arguments whose tensors, nested or not, hold the guidance batch in dimension 0 (or that times the frames)."""

SHARED = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "rotary_embedding"})
"""Arguments whose tensors belong to no sample."""

ATTENTION = frozenset({"cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"})
"""Arguments that hold arguments of the attention layers by name."""

ATTENTION_PER_SAMPLE = frozenset({"ip_adapter_image_embeds", "ip_hidden_states", "temb", "gligen"})
"""Those among them that hold the guidance batch in dimension 0."""

ATTENTION_SHARED = frozenset({"ip_adapter_masks"})
"""Those among them that belong to no sample."""


def find_latents(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The tensor with the latents among a denoiser's arguments: its first one.

    Args:
        forward: The denoiser's own forward.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
    """
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    return next(iter(arguments.values()))


def split_batch(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], half: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Takes one half of the guidance batch out of a denoiser's arguments.

    Args:
        forward: The denoiser's own forward, whose signature names the arguments.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
        half: 0 for the first half (unconditional in diffusers' pipelines), 1 for the second.

    Raises:
        ValueError: The batch cannot be halved, or an argument is not known.
    """
    batch = find_latents(forward, args, kwargs).shape[0]
    if batch % 2:
        raise ValueError(
            f"cfg 2 halves the guidance batch, but the denoiser was called with a batch of {batch}: "
            "turn guidance on (a guidance scale above 1), or, if the pipeline calls its denoiser once for each half, "
            "take stages or steps with cfg 1."
        )

    def halve(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return tensor
        if tensor.shape[0] % batch:
            raise ValueError(f"cfg 2 cannot halve a tensor of shape {tuple(tensor.shape)} along a batch of {batch}.")
        return tensor.chunk(2)[half]

    return change_batch(forward, args, kwargs, halve, "cfg 2", "take cfg 1")


def change_batch(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[torch.Tensor], torch.Tensor],
    asked_for: str,
    remedy: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changes each tensor that holds the guidance batch among a denoiser's arguments.

    Args:
        forward: The denoiser's own forward, whose signature names the arguments.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
        change: Is given each of the tensors.
        asked_for: What needs it, for reports.
        remedy: What to do where an argument is not known.

    Raises:
        ValueError: An argument is not known.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)

    def changed(name: str, value: Any, per_sample: frozenset[str], shared: frozenset[str]) -> Any:
        if name in per_sample:
            return tree_map_only(torch.Tensor, change, value)
        if name not in shared and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            raise ValueError(
                f"{asked_for} does not know whether the denoiser's argument {name!r} holds the guidance batch: "
                f"{remedy}."
            )
        return value

    for name, value in bound.arguments.items():
        if name == "timestep":
            # one timestep for all, or one a sample
            is_one = not isinstance(value, torch.Tensor) or value.numel() == 1
            bound.arguments[name] = value if is_one else change(value)
        elif name in ATTENTION and value is not None:
            bound.arguments[name] = {
                key: changed(key, each, ATTENTION_PER_SAMPLE, ATTENTION_SHARED) for key, each in value.items()
            }
        else:
            bound.arguments[name] = changed(name, value, PER_SAMPLE, SHARED)
    return bound.args, bound.kwargs


class Halves:
    """Gives each group of ranks its half of a sample's denoiser calls.

    Args:
        forward: The denoiser's own forward, whose signature names the arguments.
        cfg: 2 if there are two groups, 1 if one has all.
    """

    def __init__(self, forward: Callable[..., Any], cfg: int) -> None:
        self._forward = forward
        self._cfg = cfg
        self._first_batch = 0

    def are_one(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_first: bool) -> bool:
        """Whether a call has no guidance batch, unlike the sample's first: guidance ended, or never belonged to it.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            is_first: Whether it is the sample's first call.
        """
        if self._cfg == 1:
            return False
        batch = find_latents(self._forward, args, kwargs).shape[0]
        if is_first:
            self._first_batch = batch
        return 2 * batch == self._first_batch

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], half: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one group, as `split_batch` gives them."""
        return (args, kwargs) if self._cfg == 1 else split_batch(self._forward, args, kwargs, half)


def join_halves(halves: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Puts the tensors of a result together again from its halves."""
    return halves[0] if len(halves) == 1 else [torch.cat(pair) for pair in zip(*halves, strict=True)]
