"""Steps as a Lightning strategy: several denoising steps at a time, one on each rank of a group.

Source: ParaStep (arXiv 2505.14741), reuse-then-predict.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from asyncdiff_pl.parallel import Layout, Parallel
from asyncdiff_pl.parallel.stages.settings import CompileMode
from asyncdiff_pl.parallel.steps.settings import StepSettings, round_of
from asyncdiff_pl.strategies.base import GroupStrategy, either


class StepParallelStrategy(GroupStrategy):
    """Computes several denoising steps at a time: each rank one, from latents that it foresees.

    After warm-up the steps go in rounds of `steps`. In a round each rank steps the scheduler ahead with the noise
    estimate that it made last, to the step that is its own, and makes that step's estimate there; then all ranks get
    all estimates, and go through the round with them. Ranks compute the whole denoiser, and only estimates travel,
    once a round. One sample takes cfg x steps ranks; more ranks form further groups, which run other samples. Any
    pipeline whose denoiser is given the scheduler's latents, and any scheduler that keeps its state in itself; no
    ControlNets.

    Args:
        steps: Steps that are computed at a time after warm-up, each by a rank; 1 leaves them one by one. More are
            faster and farther from what one rank makes.
        warm_up: Exact steps at the start of each sample, 1 or more, which every rank computes.
        cfg: 2 gives each half of the guidance batch its own ranks, which is exact; 1 keeps the batch whole.
        capture: Whether the denoiser is recorded as a CUDA graph and replayed, so that the CPU launches a step at once;
            needs an NVIDIA GPU, and by default it is where there is one.
        compile: What torch compiles: none, blocks (the repeated blocks, each kind once) or full (the whole denoiser).
        share_encoding: Whether each text and image encoder is run by one rank of a group, which alone holds its weights
            and sends what comes out to the others: less memory on each, in the same time.
        simulate: Plays all ranks in one process, to see the quality on one device without the speed.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
    """

    def __init__(
        self,
        steps: int = 2,
        warm_up: int = 3,
        cfg: int = 1,
        capture: bool | None = None,
        compile: CompileMode = "none",
        share_encoding: bool = False,
        simulate: bool = False,
        timeout: float = 600.0,
    ) -> None:
        layout = Layout(cfg=cfg, steps=steps)
        # it validates itself
        StepSettings(layout, warm_up, capture, compile)
        super().__init__(layout, 1 if simulate else layout.pipeline_ranks, timeout, share_encoding)
        self.steps = steps
        self.warm_up = warm_up
        self.cfg = cfg
        self.capture = capture
        self.compile = compile
        self.simulate = simulate

    @override
    def advice(self, module: pl.LightningModule) -> str | None:
        counts = getattr(module, "num_inference_steps", [])
        idle = [n for n in counts if self.steps > 1 and not _has_rounds(n, self.steps, self.warm_up)]
        if not idle:
            return None
        return (
            f"With {either(idle)} denoising steps, warm_up {self.warm_up} leaves no two of them to be computed at a "
            "time, and nothing is gained: take a smaller warm_up, or cfg 2 in place of steps, which is exact."
        )

    @override
    def install(self, module: pl.LightningModule) -> Parallel:
        return self.parallelized(
            module,
            steps=self.steps,
            warm_up=self.warm_up,
            cfg=self.cfg,
            capture=self.capture,
            compile=self.compile,
        )

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "strategy": "steps",
            # results.csv has the denoising steps of a sample as steps
            "parallel_steps": self.steps,
            "warm_up": self.warm_up,
            "cfg": self.cfg,
            "capture": self.capture,
            "compile": self.compile,
            "share_encoding": self.share_encoding,
            "simulate": self.simulate,
        }


def _has_rounds(num_steps: int, steps: int, warm_up: int) -> bool:
    return any(round_of(step, num_steps, steps, warm_up) for step in range(num_steps))


StrategyRegistry.register("steps", StepParallelStrategy, description="ParaStep's rounds of 2 steps", steps=2)
