"""Which modules of a UNet look beyond a patch, and the hooks that let them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.parallel.hooks import install, uninstall
from asyncdiff_pl.parallel.patches.attention import extend, self_attentions, spatial_transformers
from asyncdiff_pl.parallel.patches.convolution import Halo, convolve
from asyncdiff_pl.parallel.patches.group_norm import normalise
from asyncdiff_pl.parallel.patches.step import PatchStep


class PatchLayers:
    """Hooks on all modules of a denoiser that look beyond a patch; outside of a step they do nothing.

    Args:
        denoiser: The network.

    Raises:
        ValueError: It has a module that cannot be run in patches.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._hooked: list[nn.Module] = []
        self._step: PatchStep | None = None
        self._columns = 0
        self._seen_by = 0
        self._extended: dict[str, list[torch.Tensor]] = {}
        self.look_again()

    def look_again(self) -> None:
        """Takes over what has changed in the network: an adapter puts layers of its own around others.

        Raises:
            ValueError: There is a module now that cannot be run in patches.
        """
        denoiser = self._denoiser
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                halo = Halo.of(module, name)
                if not halo.is_empty:
                    hooks.append((module, self._convolution(name, module, halo)))
            elif isinstance(module, nn.GroupNorm):
                hooks.append((module, self._group_norm(name, module)))
        hooks += [(transformer, self._run_transformer) for _, transformer in spatial_transformers(denoiser)]
        for name, attention in self_attentions(denoiser):
            hooks.append((attention, self._run_attention))
            for projection in ("to_k", "to_v"):
                hooks.append((getattr(attention, projection), self._projection(f"{name}.{projection}")))
        # all or none: what cannot be run has been told by now
        found = [module for module, _ in hooks]
        if found == self._hooked:
            return
        for module in self._hooked:
            uninstall(module)
        for module, run in hooks:
            install(module, run)
        self._hooked = found

    @contextlib.contextmanager
    def running(self, step: PatchStep) -> Iterator[None]:
        """Has the layers look beyond the own patches, as a step wants it."""
        self._step = step
        try:
            yield
        finally:
            self._step = None
            self._extended.clear()

    def _convolution(self, name: str, module: nn.Conv2d, halo: Halo) -> Callable[..., Any]:
        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (
                convolve(name, module, halo, *args, **kwargs, step=self._step) if self._step else call(*args, **kwargs)
            )

        return run

    def _group_norm(self, name: str, module: nn.GroupNorm) -> Callable[..., Any]:
        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._step is None:
                return call(*args, **kwargs)
            return normalise(name, module, *args, **kwargs, step=self._step)

        return run

    def _run_transformer(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._columns = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).shape[-1]
        return call(*args, **kwargs)

    def _run_attention(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self._step
        if step is None or len(step.rows.own) == 1:
            return call(*args, **kwargs)
        # one process plays all patches: each sees other keys and values, of which its own rows are kept
        found = []
        for self._seen_by in range(step.rows.patches):
            grid = call(*args, **kwargs).unflatten(1, (-1, self._columns))
            found.append(step.rows.split(grid, dim=1)[self._seen_by].flatten(1, 2))
        self._seen_by = 0
        self._extended.clear()
        return torch.cat(found, 1)

    def _projection(self, name: str) -> Callable[..., Any]:
        def run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._step is None:
                return call(*args, **kwargs)
            if len(self._step.rows.own) == 1:
                return extend(name, call(*args, **kwargs), self._columns, self._step)[0]
            if name not in self._extended:
                self._extended[name] = extend(name, call(*args, **kwargs), self._columns, self._step)
            return self._extended[name][self._seen_by]

        return run
