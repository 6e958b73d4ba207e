"""Parallel in time as a Lightning strategy: all steps of a sample solved together by the ranks of a group.

Sources: ParaTAA (arXiv 2402.09970) and ParaDiGMS (arXiv 2305.16317).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from asyncdiff_pl.models.schedulers import find_scheduler
from asyncdiff_pl.parallel import Layout, Parallel, TimeParallel
from asyncdiff_pl.parallel.stages.settings import CompileMode
from asyncdiff_pl.parallel.time.saved import find_trajectory, read_trajectory
from asyncdiff_pl.parallel.time.settings import SolverName
from asyncdiff_pl.sampling.coefficients import check_kind
from asyncdiff_pl.strategies.base import GroupStrategy


class TimeParallelStrategy(GroupStrategy):
    """Solves all denoising steps of a sample together: a few iterations, each of them on all ranks, in place of steps.

    An iteration evaluates the denoiser at all states that have not converged; these evaluations, and the halves of the
    guidance batch, are shared out over the ranks of a group, and only noise estimates travel. It takes several times
    the evaluations of one step after the other, and pays where there are ranks enough for them. More ranks form
    further groups, which run other samples. Schedulers: DDIM, DDPM and Euler; no ControlNets.

    Args:
        method: triangular_anderson (ParaTAA) or picard (ParaDiGMS).
        ranks: Ranks of a group; null takes all devices of a node.
        order: Over how many steps an equation of triangular_anderson reaches; null for all of the window. 20 suits 50
            steps of Stable Diffusion.
        window: How many of the noisiest unfinished states an iteration evaluates; null for all. Fewer fit into less
            memory and take more iterations.
        memory: Of how many iterates triangular_anderson makes a new one; 1 is the plain fixed-point iteration.
        tolerance: Residual up to which a state counts as converged; null for the method's own: 1e-3 of
            triangular_anderson and 0.1 of picard, which measure it differently. 0 gives the pictures of one rank.
        eta: Noise that DDIM's steps add, from 0 (none) to 1 (DDPM's); null for the pipeline's own.
        max_iterations: After so many the states are taken as they are; null for as many as it takes.
        safeguard: Whether triangular_anderson leaves the noisiest unfinished state, and what is noisier, unaccelerated,
            so that each iteration finishes a state.
        batch: The most inputs of one call of the denoiser, halves of the guidance batch counted, to save memory; null
            for no limit.
        initial_trajectory: Begins with the states of another run: its log folder, for the sample of the same id in as
            many steps, or one file of it for all samples. That run had `--trajectories.save true`, any strategy, and
            may have had other prompts. Null begins with the noise.
        variation_steps: With an initial trajectory, how many of the last steps are solved; states before them stay the
            other run's, so that fewer keep more of its pictures. Null for all, which is exact for the new prompts.
        capture: Whether the denoiser's calls are recorded as CUDA graphs, one for each of some sizes of the batch, and
            replayed; needs an NVIDIA GPU, and by default they are where there is one.
        compile: What torch compiles: none, blocks (the repeated blocks, each kind once) or full (the whole denoiser).
        share_encoding: Whether each text and image encoder is run by one rank of a group, which alone holds its weights
            and sends what comes out to the others: less memory on each, in the same time.
        simulate: Plays all ranks in one process, to see the quality on one device without the speed.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
    """

    def __init__(
        self,
        method: SolverName = "triangular_anderson",
        ranks: int | None = None,
        order: int | None = None,
        window: int | None = None,
        memory: int = 2,
        tolerance: float | None = None,
        eta: float | None = None,
        max_iterations: int | None = None,
        safeguard: bool = True,
        batch: int | None = None,
        initial_trajectory: str | None = None,
        variation_steps: int | None = None,
        capture: bool | None = None,
        compile: CompileMode = "none",
        share_encoding: bool = False,
        simulate: bool = False,
        timeout: float = 600.0,
    ) -> None:
        self.method = method
        self.ranks = ranks
        self.order = order
        self.window = window
        self.memory = memory
        self.tolerance = tolerance
        self.eta = eta
        self.max_iterations = max_iterations
        self.safeguard = safeguard
        self.batch = batch
        self.initial_trajectory = initial_trajectory
        self.variation_steps = variation_steps
        self.capture = capture
        self.compile = compile
        self.simulate = simulate
        # it validates itself
        self._settings(1 if ranks is None else ranks, None)
        if initial_trajectory is not None and not Path(initial_trajectory).exists():
            raise ValueError(
                f"initial_trajectory is {initial_trajectory}, which does not exist: give the log folder of a run with "
                "`--trajectories.save true`, or a file of its trajectories."
            )
        layout = None if ranks is None else Layout(time=ranks)
        super().__init__(layout, 1 if simulate else ranks, timeout, share_encoding)

    @override
    def check_module(self, module: pl.LightningModule, size: tuple[int | None, int | None] = (None, None)) -> None:
        super().check_module(module, size)
        name = getattr(module, "scheduler_name", None)
        if name is not None:
            # the checkpoint's own is seen in the first sample
            check_kind(find_scheduler(name))
        for steps in getattr(module, "num_inference_steps", ()):
            self._settings(1, None).check_variation_steps(steps)

    @override
    def install(self, module: pl.LightningModule) -> Parallel:
        ranks = (self.ranks or 1) if self.simulate else self.ranks_per_group
        if self._layout is None and not self.simulate:
            self.build_groups(Layout(time=ranks))
        return self.parallelized(
            module,
            time=self._settings(ranks, module),
            capture=self.capture,
            compile=self.compile,
        )

    def _settings(self, ranks: int, module: pl.LightningModule | None) -> TimeParallel:
        return TimeParallel(
            method=self.method,
            ranks=ranks,
            order=self.order,
            window=self.window,
            memory=self.memory,
            tolerance=self.tolerance,
            eta=self.eta,
            max_iterations=self.max_iterations,
            safeguard=self.safeguard,
            batch=self.batch,
            initial_trajectory=None if self.initial_trajectory is None else lambda steps: self._read(module, steps),
            variation_steps=self.variation_steps,
        )

    def _read(self, module: pl.LightningModule | None, steps: int) -> torch.Tensor:
        """The states that the samples of the call in work begin with."""
        assert module is not None and self.initial_trajectory is not None
        place = Path(self.initial_trajectory)
        read = [read_trajectory(find_trajectory(place, steps, sample.id)) for sample in module.samples_in_work]
        return torch.stack([saved.states for saved in read])

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "strategy": "time",
            "method": self.method,
            "ranks": self.ranks,
            "order": self.order,
            "window": self.window,
            "memory": self.memory,
            "tolerance": self.tolerance,
            "eta": self.eta,
            "max_iterations": self.max_iterations,
            "safeguard": self.safeguard,
            "batch": self.batch,
            "initial_trajectory": self.initial_trajectory,
            "variation_steps": self.variation_steps,
            "capture": self.capture,
            "compile": self.compile,
            "share_encoding": self.share_encoding,
            "simulate": self.simulate,
        }


StrategyRegistry.register("time", TimeParallelStrategy, description="ParaTAA on all devices of a node")
