"""The scheduler on the CPU: its timesteps are there, and what it sends to the GPU makes nobody wait.

Pipelines let the scheduler keep its timesteps on the GPU, and most schedulers look for a timestep among them, or take
it for an index: at each step the CPU then waits until the GPU has come that far. Here they are on the CPU. A network
that is given one gets a copy on its own device, uploaded beside the computation: nothing waits. So are the noise and
the numbers that a scheduler's step itself moves to the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from asyncdiff_pl.parallel.trajectory import Overlay, Trajectory, TrajectoryListener


class Timetable(TrajectoryListener):
    """Keeps the timesteps of diffusers' schedulers on the CPU, and gives networks copies on their device.

    Each `set_timesteps` still makes `scheduler.timesteps` another object once. A scheduler of somebody else's, whose
    step may need its timesteps beside the latents, is left as it is.

    Args:
        trajectory: Knows the scheduler in use, also after users swapped it.
        denoiser: The network that the trajectory follows.
        others: Further networks of the pipeline that are called with a timestep: ControlNets.
    """

    def __init__(self, trajectory: Trajectory, denoiser: nn.Module, others: Iterable[nn.Module] = ()) -> None:
        self._trajectory = trajectory
        self._table: Overlay | None = None
        self._follow(trajectory.scheduler)
        self._around_before, trajectory.around_step = trajectory.around_step, _around_step
        trajectory.subscribe(self)
        self._handles = []
        for module in (denoiser, *others):
            places = {name: place for place, name in enumerate(_parameters(module)) if name.startswith("timestep")}
            give = functools.partial(self._give, is_denoiser=module is denoiser, places=places)
            self._handles.append(module.register_forward_pre_hook(give, with_kwargs=True))

    def remove(self) -> None:
        """Takes all hooks off; timesteps are where they are until the next `set_timesteps`."""
        for handle in self._handles:
            handle.remove()
        self._trajectory.unsubscribe(self)
        self._trajectory.host_timestep = None
        self._trajectory.around_step = self._around_before
        if self._table is not None:
            self._table.remove()
            self._table = None

    @override
    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Follows a scheduler that took another's place; its timesteps come to the CPU from the next sample on."""
        if self._table is None or self._table.owner is not trajectory.scheduler:
            self._follow(trajectory.scheduler)

    def _follow(self, scheduler: Any) -> None:
        if self._table is not None:
            self._table.remove()
            self._table = None
        is_known = type(scheduler).__module__.partition(".")[0] == "diffusers"
        if is_known and hasattr(scheduler, "set_timesteps"):
            self._table = Overlay(scheduler, "set_timesteps", self._bring)

    def _bring(self, table: Overlay, output: Any) -> None:
        timesteps = getattr(table.owner, "timesteps", None)
        # an earlier overlay may be held by somebody else's wrapper
        if table is self._table and isinstance(timesteps, torch.Tensor) and timesteps.device.type != "cpu":
            table.owner.timesteps = timesteps.cpu()

    def _give(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_denoiser: bool,
        places: dict[str, int],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_denoiser:
            self._trajectory.host_timestep = None
        device = next((x.device for x in (*args, *kwargs.values()) if _is_far(x)), None)
        if device is None:
            return None
        positional = list(args)
        for name, place in places.items():
            given = positional[place] if place < len(positional) else kwargs.get(name)
            if not isinstance(given, torch.Tensor) or given.device.type != "cpu":
                continue
            if is_denoiser and name == "timestep":
                self._trajectory.host_timestep = given
            if place < len(positional):
                positional[place] = upload(given, device)
            else:
                kwargs = kwargs | {name: upload(given, device)}
        return tuple(positional), kwargs


class _Uploads(TorchFunctionMode):
    """Within it, `tensor.to(device)` of what is on the CPU waits for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            device = torch.device(device) if isinstance(device, str) else device
            if isinstance(device, torch.device) and device.type != "cpu":
                args = (upload(args[0], device), *args[1:])
        return func(*args, **kwargs)


def _around_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
    return _Uploads() if any(_is_far(value) for value in (*args, *kwargs.values())) else nullcontext()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device, without waiting for what that device does; the tensor itself if it is there.

    Args:
        tensor: A small tensor. What is on the CPU goes through pinned memory, which the allocator keeps until the copy
            is done.
        device: Where it is wanted.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu":
        # an expanded tensor cannot be pinned as it is
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def takes_timestep(module: nn.Module) -> bool:
    """Whether a network is called with a timestep."""
    return any(name.startswith("timestep") for name in _parameters(module))


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _is_far(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"
