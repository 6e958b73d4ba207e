"""Evaluating a denoiser on any states of any samples, on all ranks of a pipeline.

An evaluation's items are states, each with each half of the guidance batch. They are split evenly over the ranks; a
rank puts its own into batches, with the rows of the denoiser's other arguments that belong to them. Only what the
denoiser gives travels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import change_batch, find_latents
from asyncdiff_pl.parallel.steps.calls import Call, Calls, Stream
from asyncdiff_pl.parallel.time.combination import Combination
from asyncdiff_pl.parallel.time.settings import share_sizes
from asyncdiff_pl.parallel.timetable import upload

_SIGNIFICANT_BITS = 3


class Evaluation:
    """What solvers ask of a denoiser, for the samples of one call of a pipeline; see `sampling.Denoise`.

    Args:
        calls: Runs the denoiser.
        combination: What the pipeline makes of estimates.
        call: The denoiser's forward.
        given: Its arguments in the step that was exact.
        estimate: What it gave then.
        number: Steps that are solved; their estimates are kept.
        ranks: Ranks that share the evaluations.
        batch: The most items of one call; None for no limit.
        exchange: This rank's messages; None plays all ranks in this process.
        rank: This rank.
    """

    def __init__(
        self,
        calls: Calls,
        combination: Combination,
        call: Call,
        given: Inputs,
        estimate: Tensor,
        number: int,
        ranks: int,
        batch: int | None,
        exchange: Exchange | None,
        rank: int,
    ) -> None:
        self.sent_bytes = 0
        """Bytes of noise estimates that this process has sent."""
        self.estimates = estimate.repeat(number, *[1] * estimate.ndim)
        """What the denoiser gave last at each step, for the whole guidance batch: [N, ...]."""
        self._calls = calls
        self._combination = combination
        self._call = call
        self._args, self._kwargs = given
        self._latents = find_latents(calls.forward, *given)
        self._ranks = ranks
        self._batch = batch
        self._exchange = exchange
        self._ranks_here = [rank] if exchange else list(range(ranks))

    def __call__(self, states: Tensor, timesteps: Tensor, samples: list[int], steps: list[int]) -> Tensor:
        """Evaluates the denoiser, guidance included.

        Args:
            states: [M, ...], as the pipeline gives them to the denoiser.
            timesteps: [M].
            samples: For each state the sample's index in the batch.
            steps: For each state the index of its step.

        Returns:
            What the scheduler would get, [M, ...].
        """
        place = self._combination.place
        of_state = [state for state in range(len(states)) for _ in range(place.copies)]
        rows = [half * place.samples + sample for sample in samples for half in range(place.copies)]
        sizes = share_sizes(len(rows), self._ranks)
        made = []
        for rank in self._ranks_here:
            start = sum(sizes[:rank])
            items = range(start, start + sizes[rank])
            made.append(self._share(states, timesteps, [of_state[at] for at in items], [rows[at] for at in items]))
        found = self._gather(made, sizes)
        places = upload(torch.tensor([[steps[state] for state in of_state], rows]), found.device)
        self.estimates[places[0], places[1]] = found
        return self._combination([*found.unflatten(0, (-1, place.copies)).unbind(1)])

    def _share(self, states: Tensor, timesteps: Tensor, of_state: list[int], rows: list[int]) -> Tensor:
        """One rank's share of the items."""
        most = len(rows) if self._batch is None else self._batch
        made = [self.estimates[0, :0]]
        for start in range(0, len(rows), max(1, most)):
            part = slice(start, start + most)
            made.append(self._run(states, timesteps, of_state[part], rows[part]))
        return torch.cat(made)

    def _run(self, states: Tensor, timesteps: Tensor, of_state: list[int], rows: list[int]) -> Tensor:
        """One call of the denoiser."""
        size = len(rows)
        key, padded = 0, size
        if self._calls.keeps_shapes:
            # few sizes to record or compile: what is too much is computed in vain
            key = padded = rounded_up(size)
        chosen = torch.tensor([of_state, rows])
        chosen = upload(torch.cat([chosen, chosen[:, -1:].expand(2, padded - size)], 1), states.device)
        args, kwargs = self._arguments(states[chosen[0]], timesteps[chosen[0]], chosen[1])
        stream = self._calls.streams.setdefault(key, Stream())
        signature = self._calls.signature_of(args, kwargs) if key else self._signature
        if stream.signature != signature:
            self._calls.fit_out(stream, signature, args, kwargs)
        (estimate,) = self._calls.compute(stream, self._call, args, kwargs)
        return estimate[:size]

    @property
    def _signature(self) -> Any:
        """One for batches of all sizes, of arguments as those of the exact step."""
        return self._calls.signature_of(self._args, self._kwargs)

    def _arguments(self, states: Tensor, timesteps: Tensor, rows: Tensor) -> Inputs:
        forward, batch = self._calls.forward, len(self._latents)

        def chosen(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or (len(tensor) == 1 and batch > 1):
                return tensor
            if len(tensor) % batch:
                raise ValueError(
                    f"Solving steps together takes the samples of a call apart, and a tensor of shape "
                    f"{tuple(tensor.shape)} is not one for each of {batch}: take stages or steps."
                )
            # frames may follow one another in the batch
            return tensor.unflatten(0, (batch, -1))[rows].flatten(0, 1)

        args, kwargs = change_batch(
            forward, self._args, self._kwargs, chosen, "Solving steps together", "take stages or steps"
        )
        place = dataclasses.replace(self._combination.place, samples=len(rows), copies=1)
        args, kwargs = self._calls.with_latents(args, kwargs, place.filled(find_latents(forward, args, kwargs), states))
        return self._calls.with_timesteps(args, kwargs, timesteps)

    def _gather(self, made: list[Tensor], sizes: list[int]) -> Tensor:
        """The estimates of all ranks."""
        if self._ranks > 1:
            kind = self._latents if self._exchange is None else made[0]
            copies = (self._ranks - 1) * (self._ranks if self._exchange is None else 1)
            self.sent_bytes += copies * sizes[0] * self.estimates[0, :1].numel() * kind.element_size()
        if self._exchange is None:
            return torch.cat(made)
        # a rank may have one item less than others
        (own,) = made
        padded = own.new_zeros(sizes[0], *own.shape[1:])
        padded[: len(own)] = own
        parts = self._exchange.gather_all(padded, "estimates of states that are solved together")
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def rounded_up(size: int) -> int:
    """The next size of which there are few: at most a quarter more."""
    unit = 1 << max(0, size.bit_length() - _SIGNIFICANT_BITS)
    return -(-size // unit) * unit
