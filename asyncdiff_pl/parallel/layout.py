"""The axes of the world: data x guidance x (stages, patches, steps or time)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

MAX_STAGES = 8
MAX_CHANNELS = 2
"""NCCL channels of boundary tensors: enough for NVLink to hide them, few enough not to slow the computation."""

PATCH_CHANNELS = 4
"""Those of patches' rows for the next step: SDXL's at 2048 x 2048 took longer than the step over two, 14 GB/s."""


@dataclass(frozen=True)
class Layout:
    """How many ranks work on what; it validates itself.

    Args:
        stages: Stages that the denoiser is cut into, 1 to 8.
        stride: Steps that one round of the stages covers, 1 or 2; 2 takes one rank more.
        cfg: 2 gives each half of the guidance batch its own ranks.
        data: Groups that work on different samples.
        patches: Patches that the rows of the latents are split into, from 1 up; more than 1 only with 1 stage.
        steps: Steps that are computed at a time, from 1 up; more than 1 only with 1 stage and 1 patch.
        time: Ranks that share out the evaluations of steps that are solved together; more than 1 only alone.

    Raises:
        ValueError: A number is out of range.
    """

    stages: int = 1
    stride: int = 1
    cfg: int = 1
    data: int = 1
    patches: int = 1
    steps: int = 1
    time: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages is {self.stages}; it must be from 1 to {MAX_STAGES}.")
        if self.stride not in (1, 2):
            raise ValueError(f"stride is {self.stride}; it must be 1 or 2.")
        if self.stride == 2 and self.stages == 1:
            raise ValueError("stride 2 needs at least 2 stages; with 1 stage there is nothing to run ahead.")
        if self.cfg not in (1, 2):
            raise ValueError(f"cfg is {self.cfg}; it must be 1 (guidance batch whole) or 2 (one half a group).")
        if self.patches < 1:
            raise ValueError(f"patches is {self.patches}; give 1 or more.")
        if self.patches > 1 and self.stages > 1:
            raise ValueError(
                f"A denoiser runs in stages or in patches, and stages is {self.stages} and patches {self.patches}; set "
                "one of them to 1."
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more.")
        if self.steps > 1 and (self.stages > 1 or self.patches > 1):
            other = "stages" if self.stages > 1 else "patches"
            raise ValueError(
                f"Ranks share out steps, or {other} of each step, and steps is {self.steps} and {other} "
                f"{getattr(self, other)}; set one of them to 1."
            )
        if self.time < 1:
            raise ValueError(f"time is {self.time} ranks; give 1 or more.")
        others = ("stages", "patches", "steps", "cfg")
        other = next((name for name in others if getattr(self, name) > 1), None)
        if self.time > 1 and other is not None:
            raise ValueError(
                f"Ranks that solve all steps together share out whole evaluations of each half of the guidance batch, "
                f"and {other} is {getattr(self, other)}; set it to 1."
            )

    @property
    def ranks_per_half(self) -> int:
        """Ranks that share one half of the guidance batch, or all of it."""
        return max(self.patches, self.steps, self.time, self.stages + self.stride - 1)

    @property
    def pipeline_ranks(self) -> int:
        """Ranks that work on one sample."""
        return self.cfg * self.ranks_per_half

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.pipeline_ranks

    def over(self, world_size: int, ranks_per_node: int | None = None) -> Layout:
        """The same layout with as many data groups as a world has room for.

        Args:
            world_size: Ranks in all.
            ranks_per_node: Ranks of one node; a pipeline does not reach over nodes.

        Raises:
            ValueError: The ranks do not fit the layout.
        """
        parts, names = f"(stages {self.stages} + stride {self.stride} - 1)", "stages, stride"
        for name in ("patches", "steps", "time"):
            if getattr(self, name) > 1:
                parts, names = f"{name} {getattr(self, name)}", name
        needs = f"cfg {self.cfg} x {parts} = {self.pipeline_ranks} ranks"
        if world_size % self.pipeline_ranks:
            raise ValueError(
                f"A pipeline of {needs} does not fit {world_size} ranks: start a multiple of {self.pipeline_ranks}, "
                f"or change {names} or cfg."
            )
        if ranks_per_node is not None and ranks_per_node % self.pipeline_ranks:
            raise ValueError(
                f"A pipeline of {needs} must lie within a node, but each node has {ranks_per_node} ranks: start a "
                f"multiple of {self.pipeline_ranks} on each."
            )
        return replace(self, data=world_size // self.pipeline_ranks)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Data group, half of the guidance batch, and number within that half, of a rank."""
        data, within = divmod(rank, self.pipeline_ranks)
        return data, *divmod(within, self.ranks_per_half)


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to; None stands for this rank alone.

    Args:
        pipeline: Ranks that work on the same sample.
        half: Ranks among them that work on the same half of the guidance batch: the stages, the patches, the
            steps of a round, or all that solve steps together.
        guidance: Ranks that do the same for the other half.
        waited: The ranks of `half`, for messages that the computation waits for: those of patches and of steps.
    """

    pipeline: dist.ProcessGroup | None = None
    half: dist.ProcessGroup | None = None
    guidance: dist.ProcessGroup | None = None
    waited: dist.ProcessGroup | None = None

    @classmethod
    def build(cls, layout: Layout) -> Groups:
        """Makes the groups of a layout in the initialised world; every rank must call it.

        Args:
            layout: The layout, whose size is the world's.
        """
        world = range(layout.world_size)
        own = layout.coordinates(dist.get_rank())
        number = PATCH_CHANNELS if layout.patches > 1 else MAX_CHANNELS
        # a group of its own for estimates, so that they do not queue behind boundary tensors
        kinds: list[tuple[Callable[[int, int, int], Any], Any]] = [
            (lambda data, half, within: data, None),
            (lambda data, half, within: (data, half), _few_channels(number)),
            (lambda data, half, within: (data, within), None),
        ]
        if layout.patches > 1 or layout.steps > 1:
            # with all channels: meanwhile there is nothing to be slowed
            kinds.append((lambda data, half, within: (data, half), None))
        found = []
        for key, options in kinds:
            members: dict[Any, list[int]] = {}
            for rank in world:
                members.setdefault(key(*layout.coordinates(rank)), []).append(rank)
            groups = {name: dist.new_group(ranks, pg_options=options) for name, ranks in members.items()}
            found.append(groups[key(*own)])
        return cls(*found)


def _few_channels(number: int) -> Any:
    """Options for messages that wait beside the computation: in NCCL each channel that waits holds a multiprocessor."""
    if dist.get_backend() != "nccl":
        return None
    # it warns of what is wanted here: messages that keep to one order
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = number
    return options
