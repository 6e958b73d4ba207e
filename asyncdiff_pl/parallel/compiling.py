"""The denoiser compiled: its repeated blocks, each kind once, or the whole network (torch.compile).

Blocks are compiled one by one, below the hooks that decide which of them run. Their parameters are inputs of what is
compiled, so that blocks of one class and equal shapes share a graph: SDXL's 70 transformer blocks have two widths, and
need two.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from asyncdiff_pl.parallel.projections import JoinedProjections, joinable_attentions

BACKEND: str | Callable[..., Any] = "inductor"
"""What torch compiles with."""

MOST_GRAPHS = 256
"""Graphs that one class of blocks may have. Torch allows 8 and runs all further ones uncompiled, with a line in its log
alone; SVD has more shapes of a class than that, and each resolution adds as many."""

NHWC_DEVICES = ("cuda",)
"""Kinds of devices where weights of convolutions are laid out NHWC."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
"""Layers that are one kernel of a library, compiled or not."""


class Compiled:
    """What torch compiles of a denoiser, and its weights as compiled code wants them.

    Weights of 2-d convolutions are laid out NHWC where that pays: on a GPU, with compiled code. Inductor runs
    convolutions NHWC there and would lay out NCHW weights anew in each step. Without compiling, NHWC is slower (SVD 682
    ms a call, 628 before): the normalisations between convolutions go back to NCHW. Projections of self-attention are
    joined (projections.py).

    Args:
        denoiser: The network whose weights are laid out.
        parts: The modules that are called through `wrap`, by name.
        gains: Whether compiling one of them gains anything; None for `can_gain`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        parts: Mapping[str, nn.Module],
        gains: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self._denoiser = denoiser
        self.parts = {name: part for name, part in parts.items() if (gains or can_gain)(part)}
        """Those that are compiled."""
        self._calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._layouts: list[tuple[nn.Parameter, tuple[int, ...]]] = []
        self.projections = {attention: JoinedProjections(attention) for attention in joinable_attentions(denoiser)}
        """Of self-attention, where they can be joined."""
        self._is_possible = True

    def prepare(self, device: torch.device) -> None:
        """Lays out the weights, as far as they are on the device; must be called before `wrap`.

        Args:
            device: Where the denoiser computes.
        """
        refusal = why_not(device)
        if refusal and self._is_possible:
            self._is_possible = False
            warnings.warn(f"The denoiser runs as it is, since torch cannot compile it here: {refusal}.", stacklevel=2)
        if not self._is_possible:
            return
        for projections in self.projections.values():
            projections.join(device)
        if device.type not in NHWC_DEVICES:
            return
        # tensors made in inference mode could not be changed outside of it
        with torch.inference_mode(False), torch.no_grad():
            for module in self._denoiser.modules():
                if isinstance(module, nn.Conv2d) and module.weight.device.type == device.type:
                    self._lay_out(module.weight)

    def look_again(self) -> None:
        """Takes over weights that were put in the place of others."""
        for projections in self.projections.values():
            projections.look_again()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled form of a module's forward, or the forward itself where compiling gains nothing.

        Args:
            name: Name of the module among the parts.
            call: Its forward, the same at each call as long as the module is.
        """
        if name not in self.parts or not self._is_possible:
            return call
        if name not in self._calls or self._calls[name][0] != call:
            # one set of graphs for each resolution is faster than one for all of them
            self._calls[name] = call, torch.compile(call, backend=BACKEND, dynamic=False)
        return self._calls[name][1]

    def allowing_all_kinds(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A call of the denoiser in which torch compiles as many kinds of blocks as there are."""
        from torch._dynamo import config  # takes a second to import

        return config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=4 * MOST_GRAPHS)(run)

    def remove(self) -> None:
        """Gives the weights their layout back; compiled code is called no more."""
        for projections in self.projections.values():
            projections.remove()
        self.projections.clear()
        with torch.inference_mode(False), torch.no_grad():
            for weight, strides in self._layouts:
                data = weight.data
                weight.data = torch.empty_strided(data.shape, strides, dtype=data.dtype, device=data.device).copy_(data)
        self._layouts.clear()
        self._calls.clear()

    def _lay_out(self, weight: nn.Parameter) -> None:
        if 0 in weight.stride():
            # it stands for a weight of another rank (weights.py), with one element in memory
            return
        laid_out = weight.data.to(memory_format=torch.channels_last)
        if laid_out.stride() != weight.stride():
            self._layouts.append((weight, weight.stride()))
            weight.data = laid_out


def why_not(device: torch.device) -> str:
    """Why torch cannot compile on this machine; empty where it can.

    Args:
        device: Where the compiled code is to run.
    """
    if BACKEND != "inductor":
        return ""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler!r} (install g++, or set CXX)"
    from torch.utils._triton import has_triton

    if not has_triton():
        return f"there is no Triton for {device.type!r} devices (install triton)"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton finds no C compiler {' or '.join(compilers)} (install gcc, or set CC)"
    return ""


def can_gain(part: nn.Module) -> bool:
    """Whether there is more in a module than one layer that a library computes."""
    layers = [module for module in part.modules() if any(True for _ in module.parameters(recurse=False))]
    return len(layers) > 1 or not isinstance(layers[0], _LAYERS)
