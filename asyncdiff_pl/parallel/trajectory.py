"""Where a pipeline stands in the sampling of one sample: which step, and which denoiser call of that step.

A pipeline never announces that a new sample begins. It does call `scheduler.set_timesteps`, which makes a new
`scheduler.timesteps`: so a new sample begins at the first denoiser call that finds another object there. The position
is counted, not looked up: it rises with each `scheduler.step`, since some schedulers repeat timesteps (PNDM, Heun)
and some pipelines run only a part of them (image to image).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

Around = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]
"""Makes the context in which a method runs, from its positional and keyword arguments."""


class TrajectoryListener:
    """What can be heard of a trajectory; override what is needed."""

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """A new sample's first denoiser call is about to run; `position` and `call` are 0."""

    def on_denoiser_call(self, trajectory: Trajectory) -> None:
        """A denoiser call is about to run: call number `call` of step `position`."""

    def on_step_begin(self, trajectory: Trajectory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`scheduler.step` is about to run, with these arguments; `position` is the step that it will end."""

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """`scheduler.step` returned `output`; `position` still is the step that it ended."""


class Trajectory:
    """Follows a denoiser and its scheduler through a sample.

    Args:
        denoiser: The network that the pipeline calls in each step.
        scheduler: Returns the scheduler in use now; it is asked again at each denoiser call, since users swap
            schedulers.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Callable[[], Any]) -> None:
        self._lookup = scheduler
        self._step: Overlay | None = None
        self._listeners: list[TrajectoryListener] = []
        self._next_call = 0
        self.timesteps: torch.Tensor | None = None
        """The timesteps of the sample in work, held by reference; None before the first sample."""
        self.position = 0
        """Steps of this sample that are done."""
        self.call = 0
        """Number of the denoiser call in work among those of its step, from 0."""
        self.host_timestep: torch.Tensor | None = None
        """The timestep of that call as the pipeline gave it, if that was on the CPU and the denoiser got a copy."""
        self.around_step: Around = _plainly
        """Makes the context in which the scheduler steps."""
        self.has_one_time_work = False
        """Whether something was traced, compiled or recorded since this was last set to False: times tell little."""
        self.first_index = 0
        """Index in `timesteps` of the sample's first step: above 0 where a pipeline runs only a part of them."""
        self._starts = [0]
        """What `first_index` may be, as far as the calls so far tell."""
        self._signature = inspect.signature(denoiser.forward)
        # at once: `scheduler.step(denoiser(...), ...)` looks `step` up before the first denoiser call
        self._follow(scheduler())
        self._handle = denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True, prepend=True)

    @property
    def scheduler(self) -> Any:
        """The scheduler in use now."""
        return self._lookup()

    @property
    def num_steps(self) -> int:
        """Steps of the sample in work, as far as the scheduler tells: what it has from the first step on."""
        return 0 if self.timesteps is None else len(self.timesteps) - self.first_index

    def subscribe(self, listener: TrajectoryListener) -> None:
        """Lets `listener` hear of samples, calls and steps, after those who subscribed before it."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: TrajectoryListener) -> None:
        """Stops telling `listener`."""
        self._listeners.remove(listener)

    def reset(self) -> None:
        """Forgets the sample in work: the next denoiser call begins a new one."""
        self.timesteps = None

    def remove(self) -> None:
        """Takes all hooks off the denoiser and the scheduler."""
        self._handle.remove()
        if self._step is not None:
            self._step.remove()
            self._step = None
        self._listeners.clear()

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scheduler = self._lookup()
        if self._step is None or scheduler is not self._step.owner:
            self._follow(scheduler)
        if scheduler.timesteps is not self.timesteps:
            self.timesteps = scheduler.timesteps
            self.position = self.call = self._next_call = 0
            self._starts = self._possible_starts(scheduler, args, kwargs)
            self.first_index = self._starts[0]
            for listener in list(self._listeners):
                listener.on_sample_begin(self)
        elif len(self._starts) > 1 and self._next_call == 0:
            self._narrow_starts(args, kwargs)
        self.call = self._next_call
        self._next_call += 1
        for listener in list(self._listeners):
            listener.on_denoiser_call(self)

    def _possible_starts(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """Where a pipeline may start amid the timesteps (strength < 1)."""
        if hasattr(scheduler, "begin_index"):
            return [scheduler.begin_index or 0]
        # DDIM, DDPM and PNDM are not told: only the first calls' timesteps show it
        return self._find_timestep(args, kwargs) or [0]

    def _narrow_starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leaves out starts that a later call's timestep does not fit: PNDM repeats its second one."""
        found = self._find_timestep(args, kwargs)
        self._starts = [start for start in self._starts if start + self.position in found] or self._starts[:1]
        self.first_index = self._starts[0]

    def _find_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """Positions among the timesteps of the one that a call is given."""
        assert self.timesteps is not None
        given = self._signature.bind(*args, **kwargs).arguments.get("timestep")
        if given is None:
            return []
        same = self.timesteps == torch.as_tensor(given, device=self.timesteps.device).flatten()[0]
        return same.nonzero().flatten().tolist()

    def _follow(self, scheduler: Any) -> None:
        if self._step is not None:
            self._step.remove()
        self._step = Overlay(scheduler, "step", self._after_step, self._before_step)

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        for listener in list(self._listeners):
            listener.on_step_begin(self, args, kwargs)
        return self.around_step(args, kwargs)

    def _after_step(self, step: Overlay, output: Any) -> None:
        if step is not self._step:
            # an earlier one that somebody else's wrapper still holds
            return
        for listener in list(self._listeners):
            listener.on_step(self, output)
        self.position += 1
        self._next_call = 0


def _plainly(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
    return nullcontext()


class Overlay:
    """A method of one object that tells each time that it returned; a copy of the object gets the plain method.

    Args:
        owner: Its attribute is replaced at once.
        name: Name of the method.
        after: Is told with this overlay and what the method returned.
        around: Makes the context in which the method runs.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        after: Callable[[Overlay, Any], None],
        around: Around | None = None,
    ) -> None:
        self.owner = owner
        self._name = name
        self._own = vars(owner).get(name)
        self._method = getattr(owner, name)
        self._after = after
        self._around = around or _plainly
        # pipelines look at the arguments that a scheduler's methods take; not its attributes, which may be our own
        functools.update_wrapper(self, self._method, updated=())
        setattr(owner, name, self)

    def remove(self) -> None:
        """Gives the object its method back, unless somebody else replaced it since: what they hold stays valid."""
        if vars(self.owner).get(self._name) is not self:
            return
        if self._own is None:
            delattr(self.owner, self._name)
        else:
            setattr(self.owner, self._name, self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method, and tells."""
        with self._around(args, kwargs):
            output = self._method(*args, **kwargs)
        self._after(self, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a pipeline that steps audio beside video copies the scheduler; one that keeps a state copies attributes alone
        return copy.deepcopy(self._method, memo) if id(self.owner) in memo else self
