"""AsyncDiff's schedule once more, as a definition: one process, each stage in turn, and as plain as it can be.

It knows nothing of the package under test. A cut names modules. In an asynchronous step the whole denoiser runs once
for each stage: the modules of that stage compute, every other named module returns what it returned in the step
before, in the run of its own stage; what lies between the named modules is simply computed. A transformer that lies in
one stage is one module, its residual with it; of one that is cut, the parts are named, and its residual is computed.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

LAST = {"conv_out", "proj_out", "proj_out_2"}
"""Modules that make a denoiser's result."""


class Definition:
    """Takes a denoiser's place in a sampling loop that calls it once a step.

    Args:
        denoiser: The network; its modules' forward is replaced until `close`.
        cut: For each stage the names of its modules.
        stride: 1 or 2.
        warm_up: Exact steps.
        time_shift: Whether asynchronous steps take the timestep of the step before.
        timesteps: All timesteps of the sample.
        divisor: What the pipeline divides the scheduler's timesteps by.
        refreshes: Further steps that are exact.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        cut: list[list[str]],
        timesteps: torch.Tensor,
        stride: int = 1,
        warm_up: int = 3,
        time_shift: bool = False,
        divisor: int = 1,
        refreshes: tuple[int, ...] = (),
    ) -> None:
        self.denoiser = denoiser
        self.num_stages = len(cut)
        self.timesteps = timesteps
        self.stride = stride
        self.warm_up = warm_up
        self.shift = int(time_shift)
        self.divisor = divisor
        self.refreshes = refreshes
        self.last_exact = -1
        self.signature = inspect.signature(denoiser.forward)
        self.step = 0
        self.stage: int | None = None
        self.stale: dict[str, Any] = {}
        self.made: dict[str, Any] = {}
        self.replaced: list[nn.Module] = []
        self.output_stage = next(stage for stage, names in enumerate(cut) if LAST & set(names))
        for stage, names in enumerate(cut):
            for name in names:
                self._replace_leaves(name, denoiser.get_submodule(name), stage)

    def _replace_leaves(self, name: str, module: nn.Module, stage: int) -> None:
        # a list of modules is never called itself
        if isinstance(module, nn.ModuleList) or hasattr(module, "resnets"):
            for child_name, child in module.named_children():
                self._replace_leaves(f"{name}.{child_name}", child, stage)
        else:
            self._replace(name, module, stage)

    def _replace(self, name: str, module: nn.Module, stage: int) -> None:
        forward = module.forward

        def stale_or_fresh(*args: Any, **kwargs: Any) -> Any:
            if self.stage is not None and self.stage != stage:
                return tree_map(_copy, self.stale[name])
            output = forward(*args, **kwargs)
            assert name not in self.made, "a module that is called twice in a run is not defined here"
            self.made[name] = tree_map(_copy, output)
            return output

        module.forward = stale_or_fresh
        self.replaced.append(module)

    def close(self) -> None:
        """Gives the denoiser back."""
        for module in self.replaced:
            del module.forward

    def _run(self, stage: int | None, step: int, args: tuple, kwargs: dict) -> tuple[Any, dict[str, Any]]:
        """The denoiser's result, with one stage fresh or (None) all, and what the fresh modules made."""
        self.stage, self.made = stage, {}
        t = self.timesteps[min(step, len(self.timesteps) - 1)]
        # lists of its own: a UNet takes T2I adapters' residuals out of what it is given
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        bound = self.signature.bind(*args, **kwargs)
        # one for all, or one a sample
        given = bound.arguments["timestep"]
        bound.arguments["timestep"] = (t if self.divisor == 1 else t / self.divisor).expand(given.shape)
        return self.denoiser(*bound.args, **bound.kwargs), self.made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        s, self.step = self.step, self.step + 1
        if s < self.warm_up or s in self.refreshes:
            self.last_exact = s
            result, self.stale = self._run(None, s, args, kwargs)
            return result
        if self.stride == 1:
            runs = [self._run(stage, s - self.shift, args, kwargs) for stage in range(self.num_stages)]
            result = runs[self.output_stage][0]
        elif (s - self.last_exact) % 2 == 0:
            return self.ahead
        else:
            result, _ = self._run(self.output_stage, s - self.shift, args, kwargs)
            runs = [self._run(stage, s + 1 - self.shift, args, kwargs) for stage in range(self.num_stages)]
            self.ahead = runs[self.output_stage][0]
        for _, made in runs:
            self.stale |= made
        return result


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
