"""What makes the CPU wait for the GPU within a pipeline's loop, taken out of it: timesteps, and SVD's guidance test.

The rest of a pipeline stays diffusers' own. A pipeline whose guidance scale is a tensor, one number a frame, asks the
GPU twice a step whether it guides at all; here it asks when the scale is set.

What still waits within a loop, out of reach or by its nature: DiT's pipeline, which uploads each timestep itself;
inpainting with a denoiser of 4 channels, which makes noise of each step's level; `FlowMatchHeunDiscreteScheduler`,
which compares with a table on the GPU; schedulers that are not of diffusers, as they are written; `until_drift`, since
the CPU decides, while warm-up lasts; and, once a sample each, the comparison of the ranks' inputs and of their latents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from asyncdiff_pl.parallel.timetable import Timetable, takes_timestep
from asyncdiff_pl.parallel.trajectory import Trajectory

_TEST = "do_classifier_free_guidance"
_ANSWER = "_asyncdiff_pl_is_guided"


class HostSide:
    """Keeps the CPU ahead of the GPU in a pipeline's loop.

    Args:
        pipe: A diffusers pipeline, or a bare denoiser.
        denoiser: The network that it calls in each step.
        trajectory: Follows that network and its scheduler.
    """

    def __init__(self, pipe: Any, denoiser: nn.Module, trajectory: Trajectory) -> None:
        parts = [] if isinstance(pipe, nn.Module) else vars(pipe).values()
        others = {part for part in parts if isinstance(part, nn.Module) and part is not denoiser}
        self._timetable = Timetable(trajectory, denoiser, [part for part in others if takes_timestep(part)])
        self._pipe = pipe
        self._class, self._own = type(pipe), None
        if _guides_by_frame(type(pipe)):
            pipe.__class__ = self._own = _testing_once(type(pipe))

    def remove(self) -> None:
        """Gives the pipeline back as it was."""
        self._timetable.remove()
        if self._own is not None and type(self._pipe) is self._own:
            self._pipe.__class__ = self._class
            vars(self._pipe).pop(_ANSWER, None)


def _guides_by_frame(kind: type[Any]) -> bool:
    """Whether pipelines of a class may have a guidance scale that is a tensor, as SVD's have."""
    is_tested = isinstance(inspect.getattr_static(kind, _TEST, None), property)
    return is_tested and "max_guidance_scale" in inspect.signature(kind.__call__).parameters


def _testing_once(kind: type[Any]) -> type[Any]:
    """The same class, by name too, whose guidance test is made when a tensor is set as the scale, not at each step."""

    def scale(self: Any) -> Any:
        if "_guidance_scale" not in vars(self):
            raise AttributeError(f"{kind.__name__} has no _guidance_scale before its first call.")
        return vars(self)["_guidance_scale"]

    def set_scale(self: Any, value: Any) -> None:
        vars(self)["_guidance_scale"] = value
        vars(self).pop(_ANSWER, None)
        if isinstance(value, torch.Tensor):
            vars(self)[_ANSWER] = bool(getattr(super(own, self), _TEST))

    def test(self: Any) -> bool:
        return vars(self)[_ANSWER] if _ANSWER in vars(self) else getattr(super(own, self), _TEST)

    described = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = type(
        kind.__name__, (kind,), described | {"_guidance_scale": property(scale, set_scale), _TEST: property(test)}
    )
    return own
