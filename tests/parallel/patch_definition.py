"""Patch parallelism once more, as a definition: one process, whole tensors, and as plain as it can be.

It knows nothing of the package under test. The whole denoiser runs once a step. Convolutions, GroupNorms and spatial
self-attentions keep their whole inputs of the step before; in a step that is not exact each of them computes a result
for each patch, from what that patch knows, of which the patch's own rows are taken. All other layers act on each row by
itself.

A patch knows its own rows of this step and all other rows of the step before (`no_sync`: of the last exact step;
`naive`: it knows nothing).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


class PatchDefinition:
    """Takes a denoiser's place in a sampling loop that calls it once a step.

    Args:
        denoiser: The network; its modules' forward is replaced until `close`.
        shares: Rows of each patch in the latents.
        columns: Columns of the latents.
        mode: A mode's name.
        warm_up: Exact steps.
        portion: Share of a neighbour's rows that attention sees.
    """

    def __init__(
        self, denoiser: nn.Module, shares: Sequence[int], columns: int, mode: str, warm_up: int, portion: float = 1.0
    ) -> None:
        self.denoiser = denoiser
        self.shares = shares
        self.columns = columns
        self.mode = mode
        self.warm_up = warm_up
        self.portion = portion
        self.step = 0
        self.before: dict[str, torch.Tensor] = {}
        self.now: dict[str, torch.Tensor] = {}
        self.replaced: list[nn.Module] = []
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d):
                self._replace(name, module, self._convolution)
            elif isinstance(module, nn.GroupNorm):
                self._replace(name, module, self._group_norm)
            # attn1 of a block over time is of frames
            elif name.endswith(".attn1") and "temporal" not in name and "motion" not in name:
                self._replace(name, module, self._attention)

    def _replace(self, name: str, module: nn.Module, defined: Any) -> None:
        plain = module.forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.now[name] = hidden.clone()
            if self.is_exact:
                return plain(hidden, *args, **kwargs)
            return defined(module, plain, hidden, self.before.get(name))

        module.forward = forward
        self.replaced.append(module)

    def close(self) -> None:
        """Gives the denoiser back."""
        for module in self.replaced:
            del module.forward

    @property
    def is_exact(self) -> bool:
        """Whether the step in work is."""
        return self.mode == "full_sync" or (self.mode != "naive" and self.step < self.warm_up)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.now = {}
        result = self.denoiser(*args, **kwargs)
        if self.is_exact or self.mode != "no_sync":
            self.before = self.now
        self.step += 1
        return result

    def _patches(self, rows: int) -> Iterator[tuple[int, int]]:
        """First row and end of each patch in a tensor of that many rows."""
        total, begin = sum(self.shares), 0
        for share in self.shares:
            end = begin + share
            yield begin * rows // total, end * rows // total
            begin = end

    def _convolution(self, module: nn.Conv2d, plain: Any, hidden: torch.Tensor, before: torch.Tensor | None) -> Any:
        found, rows = [], hidden.shape[2]
        for begin, end in self._patches(rows):
            known = torch.zeros_like(hidden) if self.mode == "naive" else before.clone()
            known[:, :, begin:end] = hidden[:, :, begin:end]
            whole = plain(known)
            made = whole.shape[2]
            found.append(whole[:, :, begin * made // rows : end * made // rows])
        return torch.cat(found, 2)

    def _group_norm(self, module: nn.GroupNorm, plain: Any, hidden: torch.Tensor, before: torch.Tensor | None) -> Any:
        """With E[x] and E[x²] of each group of channels, and no correction for the number of values."""

        def moments(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            groups = tensor.double().reshape(tensor.shape[0], module.num_groups, -1)
            return groups.mean(2), (groups**2).mean(2)

        found = []
        for begin, end in self._patches(hidden.shape[-2]):
            own = hidden[..., begin:end, :]
            first, second = moments(own)
            local = second - first**2
            if self.mode == "sync_gn":
                first, second = moments(hidden)
            elif self.mode == "stale_gn":
                known = before.clone()
                known[..., begin:end, :] = own
                first, second = moments(known)
            elif self.mode == "corrected_async_gn":
                changes = zip(moments(before), (first, second), moments(before[..., begin:end, :]), strict=True)
                first, second = (stale + fresh - own_stale for stale, fresh, own_stale in changes)
            variance = second - first**2
            variance = torch.where(variance < 0, local, variance)
            grouped = own.double().unflatten(1, (module.num_groups, -1))
            shape = [*variance.shape, *[1] * (grouped.ndim - 2)]
            plain_result = (grouped - first.view(shape)) / (variance.view(shape) + module.eps).sqrt()
            channels = [-1, *[1] * (own.ndim - 2)]
            scaled = plain_result.flatten(1, 2) * module.weight.view(channels) + module.bias.view(channels)
            found.append(scaled.to(hidden.dtype))
        return torch.cat(found, -2)

    def _attention(self, module: Any, plain: Any, hidden: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        rows = round((hidden.shape[1] * sum(self.shares) / self.columns) ** 0.5)
        hidden = hidden.unflatten(1, (rows, -1))
        patches, found = list(self._patches(rows)), []
        for at, (begin, end) in enumerate(patches):
            own = hidden[:, begin:end]
            known = [own]
            if self.mode != "naive":
                before_rows = before.unflatten(1, (rows, -1))
                above, below = before_rows[:, :begin], before_rows[:, end:]
                if self.portion < 1:
                    # the nearest rows of the nearest patches, in whole rows
                    near_above = round(self.portion * _length(patches, at - 1))
                    near_below = round(self.portion * _length(patches, at + 1))
                    above, below = above[:, begin - near_above :], below[:, :near_below]
                known = [above, own, below]
            found.append(_attend(module, own.flatten(1, 2), torch.cat(known, 1).flatten(1, 2)))
        return torch.cat(found, 1)


def _length(patches: list[tuple[int, int]], at: int) -> int:
    return patches[at][1] - patches[at][0] if 0 <= at < len(patches) else 0


def _attend(module: Any, queries: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax attention of tokens [B, N, C] to tokens [B, M, C]."""
    q, k, v = (
        projection(tokens).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for projection, tokens in ((module.to_q, queries), (module.to_k, seen), (module.to_v, seen))
    )
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return module.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
