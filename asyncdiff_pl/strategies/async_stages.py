"""AsyncDiff as a Lightning strategy: the denoiser's stages on the ranks of a group (arXiv 2406.06911)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from asyncdiff_pl.parallel import Layout, Parallel, parallelize
from asyncdiff_pl.parallel.api import check_settings
from asyncdiff_pl.strategies.base import GroupStrategy


class AsyncDiffStrategy(GroupStrategy):
    """Cuts the denoiser into stages that compute at the same time, each from what the others made a step before.

    One sample takes cfg x (stages + stride - 1) ranks; more ranks form further groups, which run other samples.

    Args:
        stages: Number of stages that the denoiser is cut into, 1 to 8; 1 leaves it whole.
        stride: Steps that one round of the stages covers, 1 or 2; 2 is faster, needs one rank more, and uses inputs
            twice as old.
        warm_up: Exact steps at the start of each sample, 1 or more; more are slower and nearer to one GPU's result.
        time_shift: Whether asynchronous steps give the denoiser the timestep of the step before.
        cfg: 2 gives each half of the guidance batch its own ranks, which is exact; 1 keeps the batch whole.
        cut: For each stage the list of its module names in the denoiser (a name covers all below it); null finds a
            balanced cut.
        simulate: Plays all ranks in one process, to see a layout's quality on one device without its speed.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
    """

    def __init__(
        self,
        stages: int = 1,
        stride: int = 1,
        warm_up: int = 3,
        time_shift: bool = False,
        cfg: int = 1,
        cut: list[list[str]] | None = None,
        simulate: bool = False,
        timeout: float = 600.0,
    ) -> None:
        layout = Layout(stages, stride, cfg)
        check_settings(layout, warm_up, cut)
        super().__init__(layout, 1 if simulate else layout.pipeline_ranks, timeout)
        self.stages = stages
        self.stride = stride
        self.warm_up = warm_up
        self.time_shift = time_shift
        self.cfg = cfg
        self.cut = cut
        self.simulate = simulate

    @override
    def check_module(self, module: pl.LightningModule) -> None:
        if "pipeline" not in dir(module):
            raise ValueError(
                f"AsyncDiffStrategy runs modules that have a diffusers `pipeline`, and {type(module).__name__} has "
                "none: subclass DiffusionPredictor, or take another strategy."
            )
        if self.cfg == 2 and getattr(module, "is_guided", None) is False:
            raise ValueError(
                "cfg 2 halves the guidance batch, but guidance is off: turn it on (a guidance scale above 1), or take "
                "cfg 1."
            )

    @override
    def advice(self, module: pl.LightningModule) -> str | None:
        few = [steps for steps in getattr(module, "num_inference_steps", []) if steps <= self.warm_up]
        if not few or self.stages == 1:
            return None
        return (
            f"With {' or '.join(map(str, few))} denoising steps, warm_up {self.warm_up} leaves none for {self.stages} "
            "stages to gain time in: take a smaller warm_up, or cfg 2 in place of stages."
        )

    @override
    def install(self, module: pl.LightningModule) -> Parallel:
        return parallelize(
            module.pipeline,
            stages=self.stages,
            stride=self.stride,
            warm_up=self.warm_up,
            time_shift=self.time_shift,
            cfg=self.cfg,
            cut=self.cut,
            simulate=self.simulate,
            timeout=self.timeout,
            trajectory=module.trajectory,
            groups=self.groups,
        )

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "strategy": "asyncdiff",
            "stages": self.stages,
            "stride": self.stride,
            "warm_up": self.warm_up,
            "time_shift": self.time_shift,
            "cfg": self.cfg,
            "simulate": self.simulate,
            "cut": self._handle.cut_hash if self._handle and self._handle.cut else None,
        }


StrategyRegistry.register("asyncdiff", AsyncDiffStrategy, description="AsyncDiff's stages, 2 of them", stages=2)
