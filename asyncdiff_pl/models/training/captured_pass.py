"""CUDA graphs of a network's forward and backward pass: two launches in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from asyncdiff_pl.parallel.capture import without_cast_cache

WARM_UP_PASSES = 3
"""Passes before the capture: libraries choose their kernels and take their workspaces in the first ones."""


class CapturedPass:
    """A call with gradients that is recorded once and replayed from then on, for inputs of the same shapes.

    `torch.cuda.make_graphed_callables` does the same, but other threads of the process may not use CUDA meanwhile, as
    those of data loaders and of NCCL do, and it knows no keyword arguments.

    Gradients of the parameters lie in memory that the next replay overwrites: they must be used up by then, so that
    gradients cannot be accumulated over several passes.

    Args:
        call: Takes the inputs by name and gives one tensor that depends on the parameters.
        parameters: What gradients are wanted for; their memory must stay where it is.
        inputs: Tensors on a GPU, without gradients.

    Source: CUDA graphs in PyTorch's notes on CUDA semantics, "Partial-network capture".
    """

    def __init__(
        self, call: Callable[..., Tensor], parameters: Iterable[nn.Parameter], inputs: dict[str, Tensor]
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.inputs = {name: value.detach().clone() for name, value in inputs.items()}
        device = next(iter(self.inputs.values())).device

        def run() -> Tensor:
            with without_cast_cache(device):
                return call(**self.inputs)

        self._record(run)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The same call with other inputs.

        Raises:
            ValueError: Inputs have other names, shapes or types than those that were recorded.
        """
        found = {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()}
        wanted = {name: (tuple(value.shape), value.dtype) for name, value in self.inputs.items()}
        if found != wanted:
            raise ValueError(
                f"A captured network takes inputs as they were in the first step, {wanted}, and was given {found}; "
                "set model.capture to false."
            )
        # in the order that was recorded
        return _Replay.apply(self, *(inputs[name] for name in self.inputs), *self.parameters)

    def _record(self, call: Callable[[], Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                output = call()
                self._gradients(output, torch.zeros_like(output))
                del output
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        # data loaders and NCCL go on in threads of their own
        with torch.cuda.graph(self.forward_graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = call()
        self.output_gradient = torch.zeros_like(self.output)
        with torch.cuda.graph(self.backward_graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.gradients = self._gradients(self.output, self.output_gradient)
        # its history has done its work
        self.output = self.output.detach()

    def _gradients(self, output: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, self.parameters, gradient, allow_unused=True)


class _Replay(torch.autograd.Function):
    """Both graphs as one operation for autograd."""

    @staticmethod
    def forward(ctx: Any, captured: CapturedPass, *tensors: Tensor) -> Tensor:
        ctx.captured = captured
        for recorded, value in zip(captured.inputs.values(), tensors, strict=False):
            recorded.copy_(value)
        captured.forward_graph.replay()
        return captured.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: CapturedPass = ctx.captured
        captured.output_gradient.copy_(gradient)
        captured.backward_graph.replay()
        found = [None if value is None else value.detach() for value in captured.gradients]
        return (None, *([None] * len(captured.inputs)), *found)
