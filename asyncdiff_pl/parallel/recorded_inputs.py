"""What a recording is given: tensors that stay, into which each call's are copied, and all else as it was.

Source: CUDA graphs in PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from asyncdiff_pl.parallel.capture import CannotCapture


class StaticInputs:
    """Tensors that a recording reads: they stay where they are, and each call's are copied into them.

    Args:
        given: Arguments of a call, nested in any way.
        device: Where all tensors are to be; small ones may be given on the CPU.
    """

    def __init__(self, given: Any, device: torch.device) -> None:
        leaves, self._spec = tree_flatten(given)
        # tensors made in inference mode could not be written outside it
        with torch.inference_mode(False):
            self._leaves = [
                torch.empty_like(leaf, device=device, requires_grad=False) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]
        self.load(given)

    @property
    def given(self) -> Any:
        """The arguments with these tensors; each time in containers of their own, since some networks take out."""
        return tree_unflatten(self._leaves, self._spec)

    def load(self, given: Any) -> None:
        """Copies in another call's tensors, without waiting for the GPU.

        Args:
            given: Arguments of which `frozen` gives the same.
        """
        pairs = [
            (to, leaf)
            for to, leaf in zip(self._leaves, tree_leaves(given), strict=True)
            if isinstance(leaf, torch.Tensor)
        ]
        here = [pair for pair in pairs if pair[1].device == pair[0].device]
        if here:
            torch._foreach_copy_([to for to, _ in here], [leaf for _, leaf in here])
        for to, leaf in pairs:
            if leaf.device != to.device:
                # from pinned memory the CPU need not wait, and torch reuses it only when the copy is done
                to.copy_(leaf.pin_memory(), non_blocking=True)


def frozen(given: Any) -> Hashable:
    """What a replay would keep of a call's arguments: all but the tensors' values.

    Raises:
        CannotCapture: An argument cannot be compared.
    """
    leaves, spec = tree_flatten(given)
    found = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    try:
        hash(found)
    except TypeError:
        kinds = sorted({type(leaf).__name__ for leaf in leaves if type(leaf).__hash__ is None})
        raise CannotCapture(f"the denoiser is given a {' and a '.join(kinds)}, which a graph would freeze") from None
    return found, spec
