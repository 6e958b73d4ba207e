"""The cuts of one denoiser: a program for each kind of inputs, since shapes decide which units run, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.stages.costs import agreed_costs
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.stages.settings import Settings
from asyncdiff_pl.parallel.stages.units import Graph


class Programs:
    """Cuts a denoiser into stages once for each kind of inputs.

    Args:
        denoiser: The network.
        forward: Its forward, before any hook.
        twin: The network as `meta_twin` gives it.
        settings: Layout, cut, and how stages are balanced.
        exchange: This rank's messages, which costs are agreed on with; None where one process plays all ranks.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        forward: Callable[..., Any],
        twin: nn.Module,
        settings: Settings,
        exchange: Exchange | None,
    ) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._twin = twin
        self._settings = settings
        self._exchange = exchange
        self._made: dict[Hashable, Program] = {}

    def of(self, kind: Hashable, inputs: Inputs, leaves_out: bool) -> Program:
        """The program for a kind of inputs.

        Args:
            kind: What tells it from others.
            inputs: Arguments of a call of that kind.
            leaves_out: Whether modules that a given cut names may be left out in it.
        """
        if kind not in self._made:
            self._made[kind] = Program.make(
                *(self._twin, self._forward, self._settings.layout, self._cut, *inputs),
                leaves_out=leaves_out,
                measure=self._measure(inputs),
                folded=self._settings.folded,
            )
        return self._made[kind]

    @property
    def _cut(self) -> Sequence[Sequence[str]] | None:
        """The cut that is given, if one is; in a relay the first that was found, since weights stay where they are."""
        first = next(iter(self._made.values()), None)
        return self._settings.cut if first is None or self._settings.warm_up_mode != "relay" else first.cut

    def _measure(self, inputs: Inputs) -> Callable[[Graph], list[int]] | None:
        """What measures a cut's costs at some inputs; None where operations are counted."""
        settings = self._settings
        if settings.balance == "operations":
            return None
        return lambda graph: agreed_costs(
            self._denoiser, self._forward, graph, *inputs, settings.compile, self._exchange
        )
