"""The world of a strategy that lets several ranks work on one sample: ranks, devices, process groups.

Ranks are numbered group by group. The ranks of one group run the same samples, different groups different ones.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import nn
from typing_extensions import override

from asyncdiff_pl.parallel import Groups, Layout, Parallel, parallelize
from asyncdiff_pl.parallel.encoders import encoders_of
from asyncdiff_pl.parallel.weights import left_behind
from asyncdiff_pl.processes import die_with_parent
from asyncdiff_pl.strategies.launcher import GroupLauncher

FEW_STEPS = 8
"""Denoising steps that few-step models (Turbo, LCM, Lightning) take at most."""


class GroupStrategy(ParallelStrategy):
    """Shares each sample out over the ranks of a group, and the samples over the groups.

    Args:
        layout: What the ranks of one group do; None where that is chosen when the module is there, in `install`, which
            then calls `build_groups`.
        ranks_per_group: Ranks of one group: the layout's, or 1 where one process plays them all; None for all ranks of
            a node.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
        share_encoding: Whether each encoder is run by one rank of a group, which alone holds its weights.
    """

    is_distributed = True
    """Lightning looks this up by name."""

    simulate: bool = False
    """Whether one process plays all ranks."""

    def __init__(
        self, layout: Layout | None, ranks_per_group: int | None, timeout: float, share_encoding: bool = False
    ) -> None:
        super().__init__()
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout} s; give a number of seconds above 0.")
        self.num_nodes = 1
        self._ranks_per_group = ranks_per_group
        self.timeout = timedelta(seconds=timeout)
        self.share_encoding = share_encoding
        self._layout = layout
        self._groups: Groups | None = None
        self._handle: Parallel | None = None
        self._owns_connection = False
        self._has_failed = False

    def parallelized(self, module: pl.LightningModule, **settings: Any) -> Parallel:
        """Runs a module's denoiser on the ranks of the group, as `parallelize` does.

        Args:
            module: What runs a pipeline.
            settings: The strategy's own arguments of `parallelize`.
        """
        return parallelize(
            module.pipeline,
            share_decoding=True,
            share_encoding=self.share_encoding,
            simulate=self.simulate,
            timeout=self.timeout,
            trajectory=module.trajectory,
            groups=self.groups,
            **settings,
        )

    # -- what a subclass says -----------------------------------------------------------------------------------

    @abstractmethod
    def install(self, module: pl.LightningModule) -> Parallel:
        """Makes a module's denoiser run on the ranks of the group."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The strategy's settings for results.csv."""

    def check_module(self, module: pl.LightningModule, size: tuple[int | None, int | None] = (None, None)) -> None:
        """Tells early whether a module can be run this way.

        Args:
            module: What would run.
            size: Height and width of the data's pictures in pixels, None where they are not known.

        Raises:
            ValueError: It cannot.
        """
        if "pipeline" not in dir(module):
            raise ValueError(
                f"{type(self).__name__} runs modules that have a diffusers `pipeline`, and {type(module).__name__} has "
                "none: subclass DiffusionPredictor, or take another strategy."
            )
        is_split = self._layout is not None and self._layout.cfg == 2
        if is_split and getattr(module, "is_guided", None) is False:
            raise ValueError(
                "cfg 2 halves the guidance batch, but guidance is off: turn it on (a guidance scale above 1) where the "
                "pipeline guides in one batch, as FLUX does not, or take cfg 1."
            )

    def advice(self, module: pl.LightningModule) -> str | None:
        """What a user should know before a module is run this way, in a sentence."""
        return None

    # -- what callbacks and data modules ask --------------------------------------------------------------------

    @property
    def groups(self) -> Groups:
        """The process groups of this rank."""
        if self._groups is None:
            raise RuntimeError("The process groups exist only after `setup_environment()`.")
        return self._groups

    @property
    def handle(self) -> Parallel | None:
        """What is installed on the module in work."""
        return self._handle

    @property
    def ranks_per_group(self) -> int:
        """Ranks that work on one sample."""
        return self.num_processes if self._ranks_per_group is None else self._ranks_per_group

    @property
    def data_size(self) -> int:
        """Number of groups that run different samples."""
        return self.world_size // self.ranks_per_group

    @property
    def data_rank(self) -> int:
        """Number of this rank's group."""
        return self.global_rank // self.ranks_per_group

    @property
    def is_group_leader(self) -> bool:
        """Whether this rank scores and writes for its group."""
        return self.global_rank % self.ranks_per_group == 0

    def traffic(self) -> dict[str, float]:
        """Bytes of boundary tensors that this rank has sent, and its asynchronous steps, so far."""
        if self._handle is None:
            return {"sent_bytes": 0, "steps": 0}
        return {"sent_bytes": self._handle.sent_bytes, "steps": self._handle.asynchronous_steps}

    def check(self) -> None:
        """Tells early whether the ranks fit the layout.

        Raises:
            ValueError: They do not.
        """
        if self._layout is not None and self.ranks_per_group > 1:
            self._layout.over(self.num_processes * self.num_nodes, self.num_processes)

    # -- what Lightning asks ------------------------------------------------------------------------------------

    @property
    def num_processes(self) -> int:
        """Ranks of this node."""
        return len(self.parallel_devices or [])

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_size, "rank": self.data_rank}

    def set_world_ranks(self) -> None:
        """Numbers this process; Lightning calls it by name."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # under torchrun it starts nothing, but still checks devices x nodes against the world size
        self._launcher = GroupLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        # nothing is loaded by now
        self.check_module(model, picture_size(getattr(model.trainer, "datamodule", None)))
        advice = self.advice(model)
        if advice:
            rank_zero_warn(advice)

    @override
    def setup_environment(self) -> None:
        die_with_parent()
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        self.check()
        if self.world_size == 1:
            self._groups = Groups()
            return
        if not _distributed_is_initialized():
            backend = _get_default_process_group_backend_for_device(self.root_device)
            device = self.root_device if self.root_device.type != "cpu" else None
            _init_dist_connection(self.cluster_environment, backend, timeout=self.timeout, device_id=device)
            self._owns_connection = True
        self._groups = Groups()
        if self._layout is not None:
            self.build_groups(self._layout)

    def build_groups(self, layout: Layout) -> None:
        """Makes the process groups of a layout; every rank must call it."""
        if self.ranks_per_group > 1:
            self._groups = Groups.build(layout.over(self.world_size, self.num_processes))

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self._handle = self.install(trainer.lightning_module)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        with contextlib.ExitStack() as stack:
            for part in self.placed_later():
                stack.enter_context(left_behind(self.model, part))
            self.model.to(self.root_device)

    def placed_later(self) -> list[nn.Module]:
        """Networks of which `install` brings to the device what a rank holds of them; the rest never gets there."""
        shares = self.share_encoding and self.ranks_per_group > 1
        return [*encoders_of(self.lightning_module.pipeline).values()] if shares else []

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._has_failed = True

    @override
    def teardown(self) -> None:
        if self._has_failed and self.world_size > 1:
            # what is under way from and to other ranks may never arrive: all processes are about to end
            return
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super().teardown()
        if self._owns_connection:
            with contextlib.suppress(RuntimeError):
                # the others may be gone already
                dist.destroy_process_group()
            self._owns_connection = False

    @override
    def barrier(self, name: str | None = None) -> None:
        if not _distributed_is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return (
            _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, torch.Tensor) else tensor
        )


def picture_size(data: Any) -> tuple[int | None, int | None]:
    """Height and width of a data module's pictures in pixels, None where they are not known."""
    return getattr(data, "height", None), getattr(data, "width", None)


def either(values: Sequence[Any]) -> str:
    """Several values in a sentence."""
    return " or ".join(map(str, values))
