"""Tensor parallelism of diffusers' UNets for scripts/benchmark_denoising.py: the method that patches are compared with.

Between blocks all ranks hold the same activations. Within a block each computes a share of the channels: of attention's
heads, of a feed-forward layer's units, of a ResNet's groups. The block's last layer has a share of the inputs, and an
all-reduce adds up what the ranks made of theirs: Megatron-LM's scheme (arXiv 1909.08053, section 3), which DistriFusion
carries over to UNets (arXiv 2402.19481). Convolutions that change the size are split over their inputs
alone. Torch's `parallelize_module` does it: linear layers by its own styles, convolutions and GroupNorms, for which
DTensor has no such rules, by two styles of this file.

Heads, units or groups that the ranks do not divide are filled up with zeros: that changes no result, and costs what an
uneven split costs the rank that has most. Input and output layers, projections around transformers and shortcuts stay
whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

Plan = dict[str, ParallelStyle]
"""How each layer of a block is split, by its name in the block."""


def tensor_mesh(device: torch.device, ranks: int, cfg: int = 1) -> DeviceMesh:
    """The ranks that share this one's layers; every rank of the world must call it.

    Args:
        device: Where this rank computes.
        ranks: How many share the layers.
        cfg: 2 if the guidance batch is split: neighbours in the world then are each other's halves.
    """
    rows = torch.arange(dist.get_world_size()).view(-1, ranks, cfg).transpose(1, 2).reshape(-1, ranks)
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    assert group is not None
    return DeviceMesh.from_group(group, device.type)


class OwnChannels(ParallelStyle):
    """Gives a convolution this rank's share of its outputs, or a GroupNorm that of its channels."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module.named_parameters():
            module.register_parameter(name, _own_share(parameter, device_mesh, 0))
        return module


class SummedConvolution(ParallelStyle):
    """Gives a convolution this rank's share of its inputs, and adds up the outputs of all ranks.

    Args:
        takes_whole_input: Whether it is called with all channels, of which it then takes its own.
    """

    def __init__(self, takes_whole_input: bool = False) -> None:
        self._takes_whole_input = takes_whole_input

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rank, size, group = device_mesh.get_local_rank(), device_mesh.size(), device_mesh.get_group()
        module.register_parameter("weight", _own_share(module.weight, device_mesh, 1))
        if rank > 0 and module.bias is not None:
            # once is enough
            module.register_parameter("bias", None)
        if self._takes_whole_input:
            module.register_forward_pre_hook(lambda _, args: (args[0].chunk(size, dim=1)[rank],))

        def add_up(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.contiguous()
            dist.all_reduce(output, group=group)
            return output

        module.register_forward_hook(add_up)
        return module


class TensorParallel:
    """What makes a denoiser's layers this rank's shares of them, until `remove()`.

    Whole layers are kept where they are: on the CPU, they take no memory of the device.

    Args:
        denoiser: A UNet with the same weights on all ranks; what stays whole must be brought to the device after this.
        mesh: The ranks that share the layers.
    """

    def __init__(self, denoiser: nn.Module, mesh: DeviceMesh) -> None:
        self._mesh, self._ranks = mesh, mesh.size()
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._summed_bytes: dict[nn.Module, int] = {}
        num_weights, self._num_split = _num_weights(denoiser), 0
        for block in [*denoiser.modules()]:
            if isinstance(block, Attention):
                plan = self._split_attention(block)
            elif isinstance(block, FeedForward):
                plan = self._split_feed_forward(block)
            elif isinstance(block, (ResnetBlock2D, TemporalResnetBlock)):
                plan = self._split_resnet(block)
            elif isinstance(block, (Downsample2D, Upsample2D)):
                plan = self._split_resampling(block)
            else:
                continue
            # each rank has the weights already: nothing has to be sent
            parallelize_module(block, mesh, plan, src_data_rank=None)
            for name, style in plan.items():
                if isinstance(style, (RowwiseParallel, SummedConvolution)):
                    block.get_submodule(name).register_forward_hook(self._count)
        self.share = self._num_split / num_weights
        """Share of the weights in layers that are split."""

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends in a denoiser call, as rings add up: each part of a tensor goes round twice."""
        return sum(self._summed_bytes.values()) * 2 * (self._ranks - 1) // self._ranks

    def remove(self) -> None:
        """Puts the whole layers back."""
        while self._before:
            module, name, value = self._before.pop()
            setattr(module, name, value)

    # -- the blocks -----------------------------------------------------------------------------------------------

    def _split_attention(self, block: Attention) -> Plan:
        """Heads are shared out."""
        size, heads = block.to_v.out_features // block.heads, self._filled(block.heads)
        for name in ("to_q", "to_k", "to_v"):
            self._replace_grown(block, name, heads * size)
        self._replace(block.to_out, "0", weight=_grown(block.to_out[0].weight, heads * size, dim=1))
        self._set(block, "heads", heads // self._ranks)
        split = {name: ColwiseParallel() for name in ("to_q", "to_k", "to_v")}
        return split | {"to_out.0": RowwiseParallel()}

    def _split_feed_forward(self, block: FeedForward) -> Plan:
        """Units are shared out; each has a row for its value and, half of all rows further, one for its gate."""
        first, last = block.net[0], block.net[2]
        assert isinstance(first, GEGLU)
        units = self._filled(last.in_features)

        def arrange(rows: torch.Tensor) -> torch.Tensor:
            halves = _grown(rows.view(2, last.in_features, -1), units, dim=1).view(2, self._ranks, -1, *rows.shape[1:])
            return halves.transpose(0, 1).reshape(2 * units, *rows.shape[1:])

        self._replace(first, "proj", **{name: arrange(rows) for name, rows in first.proj.named_parameters()})
        self._replace(block.net, "2", weight=_grown(last.weight, units, dim=1))
        return {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()}

    def _split_resnet(self, block: ResnetBlock2D | TemporalResnetBlock) -> Plan:
        """Groups of the second norm are shared out, and with them the channels between the two convolutions."""
        groups, channels = self._filled(block.norm2.num_groups), block.norm2.num_channels
        width = channels // block.norm2.num_groups
        plan: Plan = {"conv1": OwnChannels(), "norm2": OwnChannels(), "conv2": SummedConvolution()}
        if block.time_emb_proj is not None:
            plan["time_emb_proj"] = ColwiseParallel()
        for name in plan.keys() - {"conv2"}:
            self._replace_grown(block, name, groups * width)
        block.norm2.num_groups = groups // self._ranks
        self._replace(block, "conv2", weight=_grown(block.conv2.weight, groups * width, dim=1))
        return plan

    def _split_resampling(self, block: Downsample2D | Upsample2D) -> Plan:
        """Inputs of the convolution are shared out."""
        self._replace(block, "conv", weight=block.conv.weight)
        return {"conv": SummedConvolution(takes_whole_input=True)}

    # -- layers ---------------------------------------------------------------------------------------------------

    def _filled(self, count: int) -> int:
        """The next multiple of the ranks."""
        return -(-count // self._ranks) * self._ranks

    def _replace_grown(self, parent: nn.Module, name: str, size: int) -> None:
        """Puts a copy of a layer in its place, with so many outputs."""
        parameters = parent.get_submodule(name).named_parameters()
        self._replace(parent, name, **{each: _grown(value, size, dim=0) for each, value in parameters})

    def _replace(self, parent: nn.Module, name: str, **parameters: torch.Tensor) -> None:
        """Puts a copy of a layer in its place, with these parameters."""
        layer = parent.get_submodule(name)
        self._num_split += _num_weights(layer)
        memo = {id(getattr(layer, each)): _frozen(value) for each, value in parameters.items()}
        self._set(parent, name, copy.deepcopy(layer, memo))

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _count(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._summed_bytes[module] = output.numel() * output.element_size()


def _own_share(parameter: nn.Parameter, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return _frozen(distribute_tensor(parameter, mesh, [Shard(dim)], src_data_rank=None).to_local())


def _grown(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A tensor with zeros behind what it has in a dimension."""
    shape = [*tensor.shape]
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
