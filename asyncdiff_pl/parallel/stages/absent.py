"""A tensor that another rank has and nobody here needs: it has a shape, and costs nothing to compute with.

Glue runs on every rank whose stage has units around it, also over tensors that this rank never receives. What comes
out is absent too, and no kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only


class Absent(torch.Tensor):
    """Stands for a tensor of which only shape, number format and device are known."""

    @staticmethod
    def __new__(cls: type[Absent], like: torch.Tensor, device: torch.device) -> Absent:
        """Makes one.

        Args:
            cls: This class.
            like: A tensor of that shape, strides and number format, on any device; the meta device will do.
            device: The device that the tensor says it is on.
        """
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=False
        )

    def __repr__(self, **kwargs: Any) -> str:
        return f"Absent(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device: torch.device | None = None

        def to_meta(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal device
            if isinstance(tensor, Absent):
                device = tensor.device
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

        kwargs = kwargs or {}
        if func._schema.is_mutable:
            assert isinstance(args[0], Absent), f"{func} would write an absent tensor into one that is here"
            return args[0]
        given = tree_map_only(torch.Tensor, to_meta, (args, kwargs))
        given = tree_map_only(torch.device, lambda _: torch.device("meta"), given)
        output = func(*given[0], **given[1])
        assert device is not None
        return tree_map(lambda leaf: Absent(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, output)
