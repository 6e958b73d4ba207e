"""The units of a denoiser and what flows between them, found by one traced forward.

A denoiser is a tree of modules. Those that hold a list of blocks are *containers* and are looked into; everything else
that works on the latents is a *unit* and is never cut. What a container or the denoiser itself does between its units
(concatenate a skip connection, add a residual, reshape) is *glue*. The forward runs once on the meta device, where
tensors have shapes and no data, under a dispatch mode that carries with each tensor the values it was made from, so
that the inputs of a unit are known through the glue. Modules that never see the latents (time, text and image
embeddings) are no units: every rank computes them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

LATENTS = -1
"""Stands among the sources of a tensor for the latents, which every rank has."""


@dataclass(frozen=True)
class Value:
    """A tensor that may have to travel: made by a unit, or by the glue at a container's end.

    Args:
        index: Number of the value, in order of making.
        unit: Number of the unit that makes it; for glue, of the last unit among its sources.
        shape: Shape at the traced inputs.
        num_bytes: Size at the traced inputs.
        sources: For glue, the values it is made from; empty for a unit's own output.
        dtype: Number format at the traced inputs.
        stride: Strides at the traced inputs.
    """

    index: int
    unit: int
    shape: tuple[int, ...]
    num_bytes: int
    sources: frozenset[int] = frozenset()
    dtype: torch.dtype = torch.float32
    stride: tuple[int, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """One leaf of an output: a value, one of the module's own arguments, or something that no latents went into.

    Args:
        value: Number of the value that it is.
        argument: Position among the flattened arguments of the tensor that is handed through.
        constant: The leaf itself, where it is no tensor.
        is_known: False for a tensor that is none of these; only running the module can give it.
    """

    value: int | None = None
    argument: int | None = None
    constant: Any = None
    is_known: bool = True


@dataclass(frozen=True)
class Output:
    """What one call of a unit or a container returns.

    Args:
        spec: How the leaves are nested.
        leaves: The leaves in order.
        made: Positions among `leaves` of the values that this very module makes.
    """

    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    made: tuple[int, ...]


@dataclass
class Unit:
    """A piece of a denoiser that is never cut.

    Args:
        name: Module name in the denoiser.
        flops: Floating-point operations of its forward at the traced inputs.
        inputs: Values that its inputs are made from, through glue; `LATENTS` for the latents themselves.
        outputs: One for each call of the module in a forward.
    """

    name: str
    flops: int = 0
    inputs: set[int] = field(default_factory=set)
    outputs: list[Output] = field(default_factory=list)


@dataclass
class Container:
    """A module that is looked into.

    Args:
        name: Module name.
        units: Numbers of the units below it.
        outputs: One for each call in a forward.
    """

    name: str
    units: set[int] = field(default_factory=set)
    outputs: list[Output] = field(default_factory=list)


@dataclass
class Graph:
    """What a denoiser is made of at given input shapes, in order of execution.

    Args:
        units: The units.
        values: What they and the containers' glue make.
        containers: The containers by name, the denoiser itself not among them.
        result: Values that the denoiser's result is made from.
    """

    units: list[Unit]
    values: list[Value]
    containers: dict[str, Container]
    result: frozenset[int]


def split_modules(denoiser: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Splits a denoiser's modules into containers and pieces that may be units.

    A module is a container if it holds a list of at least two blocks, or the `resnets` of a UNet block; a
    transformer with a single layer is one piece. What has no parameters (activations, a sampler without
    convolution) is glue.

    Returns:
        Containers by name, without the denoiser itself, and pieces by name.
    """
    containers: dict[str, nn.Module] = {}
    pieces: dict[str, nn.Module] = {}

    def descend(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                descend(f"{prefix}{name}.", child)
            elif _is_container(child):
                containers[prefix + name] = child
                descend(f"{prefix}{name}.", child)
            elif any(True for _ in child.parameters()):
                pieces[prefix + name] = child

    descend("", denoiser)
    return containers, pieces


def _is_container(module: nn.Module) -> bool:
    lists = {name: child for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
    return "resnets" in lists or any(len(child) > 1 for child in lists.values())


def trace(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], latents: torch.Tensor) -> Graph:
    """Runs a denoiser once on the meta device and writes down its units and what flows between them.

    Args:
        twin: The network as `meta_twin` gives it.
        args: Positional arguments of a call, on any device.
        kwargs: Keyword arguments of that call.
        latents: The tensor among the arguments that holds the latents.

    Raises:
        ValueError: No module of the denoiser works on the latents.
    """
    moved: dict[int, torch.Tensor] = {}

    def to_meta(tensor: torch.Tensor) -> torch.Tensor:
        return moved.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))

    args, kwargs = tree_map_only(torch.Tensor, to_meta, (args, kwargs))
    tracer = _Tracer(*split_modules(twin))
    # inference mode would hide the views that glue makes from the dispatch mode
    with torch.inference_mode(False), torch.no_grad(), tracer.hooked():
        with FlopCounterMode(display=False) as tracer.counter, tracer:
            tracer.sources[moved[id(latents)]] = frozenset((LATENTS,))
            result = twin(*args, **kwargs)
        found = tracer.sources_of(tree_leaves(result)) - {LATENTS}
    if not found:
        raise ValueError(f"No part of {type(twin).__name__} works on the latents, so there is nothing to cut.")
    containers = {name: container for name, container in tracer.containers.items() if container.units}
    return Graph(tracer.units, tracer.values, containers, found)


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of a module, without hooks, whose parameters and buffers have shapes and no data."""
    memo: dict[int, Any] = {}
    for tensor in module.parameters():
        memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    for tensor in module.buffers():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for part in module.modules():
        for name, attribute in vars(part).items():
            if "_hooks" in name and isinstance(attribute, dict):
                # a hook may hold anything, a whole trainer for one
                memo[id(attribute)] = OrderedDict()
    return copy.deepcopy(module, memo)


class _Tracer(TorchDispatchMode):
    """Carries the sources of each tensor through the glue, and hears when units and containers begin and end."""

    def __init__(self, containers: dict[str, nn.Module], pieces: dict[str, nn.Module]) -> None:
        super().__init__()
        self.counter: FlopCounterMode
        self.sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.units: list[Unit] = []
        self.values: list[Value] = []
        self.containers = {name: Container(name) for name in containers}
        self._modules = containers, pieces
        self._numbers: dict[str, int] = {}
        self._value_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._inside: str | None = None
        self._flops_before = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside is None:
            found = self.sources_of(tree_leaves((args, kwargs)))
            if found:
                for leaf in tree_leaves(output):
                    if isinstance(leaf, torch.Tensor):
                        self.sources[leaf] = found
        return output

    def sources_of(self, leaves: Iterable[Any]) -> frozenset[int]:
        tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        return frozenset().union(*(self.sources.get(tensor, ()) for tensor in tensors))

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        containers, pieces = self._modules
        handles = []
        for name, module in pieces.items():
            handles.append(module.register_forward_pre_hook(functools.partial(self._begin_piece, name)))
            end = functools.partial(self._end_piece, name)
            handles.append(module.register_forward_hook(end, with_kwargs=True))
        for name, module in containers.items():
            end = functools.partial(self._end_container, name)
            handles.append(module.register_forward_hook(end, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin_piece(self, name: str, module: nn.Module, args: Any) -> None:
        self._inside = name
        self._flops_before = self.counter.get_total_flops()

    def _end_piece(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside = None
        found = self.sources_of(tree_leaves((args, kwargs)))
        if not found:
            return
        if name not in self._numbers:
            self._numbers[name] = len(self.units)
            self.units.append(Unit(name))
            for container in self.containers.values():
                if name.startswith(container.name + "."):
                    container.units.add(self._numbers[name])
        number = self._numbers[name]
        unit = self.units[number]
        unit.flops += self.counter.get_total_flops() - self._flops_before
        unit.inputs |= found
        unit.outputs.append(self._describe((args, kwargs), output, lambda leaf: (number, frozenset())))

    def _end_container(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        container = self.containers[name]

        def glue(leaf: torch.Tensor) -> tuple[int, frozenset[int]] | None:
            found = self.sources_of([leaf])
            last = max((self.values[index].unit for index in found if index != LATENTS), default=None)
            return (last, found) if last in container.units else None

        container.outputs.append(self._describe((args, kwargs), output, glue))

    def _describe(
        self, inputs: Any, output: Any, maker: Callable[[torch.Tensor], tuple[int, frozenset[int]] | None]
    ) -> Output:
        """Names each leaf of an output; `maker` gives unit and sources of a new value, None where it makes none."""
        arguments = {id(leaf): at for at, leaf in enumerate(tree_leaves(inputs)) if isinstance(leaf, torch.Tensor)}
        leaves, spec = tree_flatten(output)
        described: list[Leaf] = []
        made: list[int] = []
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                described.append(Leaf(constant=leaf))
            elif id(leaf) in arguments:
                described.append(Leaf(argument=arguments[id(leaf)]))
            elif leaf in self._value_of:
                described.append(Leaf(value=self._value_of[leaf]))
            elif (made_by := maker(leaf)) is not None:
                shape, stride = tuple(leaf.shape), leaf.stride()
                value = Value(len(self.values), made_by[0], shape, leaf.nbytes, made_by[1], leaf.dtype, stride)
                self.values.append(value)
                self._value_of[leaf] = value.index
                self.sources[leaf] = frozenset((value.index,))
                described.append(Leaf(value=value.index))
                made.append(at)
            else:
                described.append(Leaf(is_known=False))
        return Output(spec, tuple(described), tuple(made))
