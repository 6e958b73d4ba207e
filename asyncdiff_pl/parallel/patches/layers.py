"""Which modules of a UNet look beyond a patch, and the hooks that let them; with the compiled blocks around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.utils._pytree import tree_leaves

from asyncdiff_pl.parallel.compiling import Compiled, can_gain
from asyncdiff_pl.parallel.hooks import HOOK, Run, install, uninstall
from asyncdiff_pl.parallel.patches.attention import (
    extend,
    project_and_extend,
    room_of,
    seen_rows,
    self_attentions,
    spatial_transformers,
)
from asyncdiff_pl.parallel.patches.convolution import Halo, convolve, convolve_extended
from asyncdiff_pl.parallel.patches.group_norm import normalise
from asyncdiff_pl.parallel.patches.resnet import normalise_and_extend, norms_and_convolutions
from asyncdiff_pl.parallel.patches.rows import ROWS
from asyncdiff_pl.parallel.patches.sites import Now, Site
from asyncdiff_pl.parallel.patches.step import PatchStep
from asyncdiff_pl.parallel.projections import JoinedProjections

Call = Callable[..., Any]


class PatchLayers:
    """Hooks on all modules of a denoiser that look beyond a patch; outside of a step they do nothing.

    Args:
        denoiser: The network.
        compiled: What torch compiles of it; None for nothing.
        joins: Whether moments of norms travel together with the rows of convolutions, where that is possible: in
            synchronous steps only.

    Raises:
        ValueError: It has a module that cannot be run in patches.
    """

    def __init__(self, denoiser: nn.Module, compiled: Compiled | None = None, joins: bool = False) -> None:
        self._denoiser = denoiser
        self._compiled = compiled
        self._joins = joins
        self._hooked: list[nn.Module] = []
        self._joined: list[JoinedProjections | None] = []
        self._now = Now()
        self.look_again()

    def look_again(self) -> None:
        """Takes over what has changed in the network: an adapter puts layers of its own around others.

        Raises:
            ValueError: There is a module now that cannot be run in patches.
        """
        denoiser = self._denoiser
        pieces = {} if self._compiled is None else {part: name for name, part in self._compiled.parts.items()}
        pairs = dict(norms_and_convolutions(denoiser)) if self._joins else {}
        joined = set(pairs.values())
        hooks: dict[nn.Module, Run] = {}
        for name, module in denoiser.named_modules():
            if _has_halo(module):
                halo = Halo.of(module, name)
                if not halo.is_empty:
                    compute = convolve_extended if module in joined else convolve
                    hooks[module] = self._layer(compute, name, module, halo)
            elif module in pairs:
                halo = Halo.of(pairs[module], f"the convolution after {name}")
                hooks[module] = self._layer(normalise_and_extend, name, module, halo)
            elif isinstance(module, nn.GroupNorm):
                hooks[module] = self._layer(normalise, name, module, is_piece=module in pieces)
            elif module in pieces:
                hooks[module] = self._piece(name)
        for name, transformer in spatial_transformers(denoiser):
            hooks[transformer] = self._transformer(name, transformer)
        projections = []
        for name, attention in self_attentions(denoiser):
            projections.append(self._projections(attention))
            modules = attention, attention.to_q, attention.to_k, attention.to_v
            hooks |= dict(zip(modules, self._attention(name, attention, projections[-1]), strict=True))
        # all or none: what cannot be run has been told by now
        found = list(hooks)
        if (found, projections) == (self._hooked, self._joined):
            return
        for module in self._hooked:
            uninstall(module)
        for module, run in hooks.items():
            _install(module, run)
        self._hooked, self._joined = found, projections

    @contextlib.contextmanager
    def running(self, step: PatchStep, device: torch.device) -> Iterator[None]:
        """Has the layers look beyond the own patches, as a step wants it.

        Args:
            step: The step.
            device: Where it is computed.
        """
        now = self._now
        if now.order.device != device:
            # tensors made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                now.order = now.order.to(device)
        now.step = step
        try:
            yield
        finally:
            now.step = now.room = now.extended = None

    def _compile(self, name: str, call: Call) -> Call:
        return call if self._compiled is None else self._compiled.wrap(name, call)

    def _piece(self, name: str) -> Run:
        def run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._now.step is not None:
                call = self._compile(name, call)
            return call(*args, **kwargs)

        return run

    def _layer(self, compute: Call, name: str, *about: Any, is_piece: bool = False) -> Run:
        site, now = Site(name, self._now), self._now

        def instead(*args: Any, **kwargs: Any) -> Any:
            return compute(site, *about, *args, **kwargs)

        def run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if now.step is None:
                return call(*args, **kwargs)
            return (self._compile(name, instead) if is_piece else instead)(*args, **kwargs)

        return run

    def _transformer(self, name: str, transformer: nn.Module) -> Run:
        now = self._now

        def run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if now.step is None:
                return call(*args, **kwargs)
            hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            now.columns, now.seen = hidden.shape[-1], seen_rows(hidden.shape[ROWS], now.step)
            now.room = None if self._compiled is None else room_of(transformer, hidden, now.step)
            return self._compile(name, call)(*args, **kwargs)

        return run

    def _projections(self, attention: Attention) -> JoinedProjections | None:
        """What may be called in place of an attention's own projections in compiled code, if anything."""
        found = None if self._compiled is None else self._compiled.projections.get(attention)
        return found if found is not None and found.are_all_of(attention) else None

    def _attention(
        self, name: str, attention: Attention, joined: JoinedProjections | None
    ) -> tuple[Run, Run, Run, Run]:
        """Calls in place of an attention, and of its projections to queries, to keys and to values."""
        site, now = Site(name, self._now), self._now

        def take_in(tokens: torch.Tensor, both: list[torch.Tensor]) -> None:
            sizes = attention.to_k.out_features, attention.to_v.out_features
            now.extended = tokens, [each.split(sizes, -1) for each in both]

        def run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step = now.step
            if step is None or len(step.rows.own) == 1:
                result = call(*args, **kwargs)
                now.extended = None
                return result
            # one process plays all patches: each sees other keys and values, of which its own rows are kept
            found = []
            for now.seen_by in range(step.rows.patches):
                grid = call(*args, **kwargs).unflatten(1, (-1, now.columns))
                found.append(step.rows.split(grid, dim=1)[now.seen_by].flatten(1, 2))
            now.seen_by, now.extended = 0, None
            return torch.cat(found, 1)

        def run_queries(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # of processors that are not torch's nobody knows what they make keys of
            if now.room is not None and joined is not None and type(attention.processor) is AttnProcessor2_0:
                found = project_and_extend(site, joined, args[0])
                if found is not None:
                    take_in(args[0], [found[1]])
                    return found[0]
            return call(*args, **kwargs)

        def run_keys(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if now.step is None:
                return call(*args, **kwargs)
            if now.extended is None:
                both = None if joined is None else joined.keys_and_values(args[0])
                if both is None:
                    # the hook below lets it through
                    both = torch.cat([call(*args, **kwargs), attention.to_v(*args, **kwargs)], -1)
                take_in(args[0], extend(site, both))
            return seen(args, 0)

        def run_values(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return call(*args, **kwargs) if now.extended is None else seen(args, 1)

        def seen(args: tuple[Any, ...], which: int) -> torch.Tensor:
            assert now.extended is not None
            assert args[0] is now.extended[0], f"{name} makes keys and values from different tokens"
            return now.extended[1][now.seen_by][which]

        return run, run_queries, run_keys, run_values


def _install(module: nn.Module, run: Run) -> None:
    """Has `run` called in place of a module's forward, as a plain function.

    Torch would compile each block anew in which the forward of a layer is the partial object of diffusers' registry.
    """
    install(module, run)
    own_forward = module._diffusers_hook.get_hook(HOOK).fn_ref.original_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(own_forward, args, kwargs)

    module.forward = forward


def gains_in_patches(part: nn.Module) -> bool:
    """Whether compiling a module gains anything where convolutions have rows put around their input."""
    return can_gain(part) or (not isinstance(part, nn.Conv2d) and any(_has_halo(each) for each in part.modules()))


def _has_halo(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1
