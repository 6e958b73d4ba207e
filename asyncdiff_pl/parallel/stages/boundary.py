"""What has to travel for a given cut: the boundary tensors, who makes them and who consumes them.

Glue at the end of a container (an attention's residual, say) belongs to the stage that has the whole container: its
output travels as it is, once. A container that is cut itself has no stage of its own: a consumer then makes its glue,
from what each stage computed in the step before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asyncdiff_pl.parallel.stages.units import LATENTS, Graph


@dataclass(frozen=True)
class Boundary:
    """The boundary tensors of a cut.

    Args:
        owner: Stage of each unit.
        output_stage: The stage that makes the denoiser's result.
        maker: Stage that makes each value; None for glue over several stages, which every consumer makes itself.
        consumers: For each value that travels, the other stages that consume it, in order.
        order: The values that travel by the cost of what its stage computes before each is made: every rank expects
            the messages of a step in this order.
    """

    owner: tuple[int, ...]
    output_stage: int
    maker: tuple[int | None, ...]
    consumers: dict[int, tuple[int, ...]]
    order: tuple[int, ...]

    def consumed_by(self, stage: int) -> list[int]:
        """The values of other stages that a stage consumes, in the order of `order`."""
        return [value for value in self.order if stage in self.consumers[value]]


def find_boundary(graph: Graph, owner: Sequence[int], costs: Sequence[int] | None = None) -> Boundary:
    """Works out the boundary tensors of a cut.

    Args:
        graph: The denoiser's units and values.
        owner: Stage of each unit.
        costs: What each unit costs; None counts its operations.
    """
    whole = {
        output.leaves[at].value
        for container in graph.containers.values()
        if len({owner[unit] for unit in container.units}) == 1
        for output in container.outputs
        for at in output.made
    }
    maker: list[int | None] = []
    for value in graph.values:
        # sources are made before what is made from them
        stages = {maker[source] for source in value.sources if source != LATENTS} | {owner[value.unit]}
        # a container in one stage is computed there with all of its glue, whatever comes in from outside
        is_made_by_one = value.index in whole or len(stages) == 1
        maker.append(owner[value.unit] if is_made_by_one else None)

    def travelling(values: Iterable[int]) -> Iterable[int]:
        for index in values:
            if index == LATENTS:
                continue
            if maker[index] is None:
                yield from travelling(graph.values[index].sources)
            else:
                yield index

    output_stage = owner[max(graph.values[index].unit for index in graph.result)]
    consumers: dict[int, set[int]] = {}
    needs = [(owner[number], unit.inputs) for number, unit in enumerate(graph.units)] + [(output_stage, graph.result)]
    needs += [(owner[value.unit], value.sources) for value in graph.values if value.index in whole]
    for stage, inputs in needs:
        for index in travelling(inputs):
            if maker[index] != stage:
                consumers.setdefault(index, set()).add(stage)

    done = [0] * (max(owner) + 1)
    done_after: list[int] = []
    for number, cost in enumerate(costs or [unit.flops for unit in graph.units]):
        done[owner[number]] += cost
        done_after.append(done[owner[number]])
    made_at: dict[int, int] = {}
    newest = [0] * len(done)
    for value in graph.values:
        stage = owner[value.unit]
        # a unit that is called twice makes its second value after those of the units in between
        newest[stage] = made_at[value.index] = max(newest[stage], done_after[value.unit])
    order = sorted(consumers, key=lambda index: (made_at[index], index))
    return Boundary(
        tuple(owner),
        output_stage,
        tuple(maker),
        {index: tuple(sorted(stages)) for index, stages in consumers.items()},
        tuple(order),
    )


def bytes_per_step(graph: Graph, boundary: Boundary, copies: Sequence[int] | None = None) -> int:
    """Bytes of boundary tensors that arrive somewhere in one asynchronous step.

    Args:
        graph: The denoiser's units and values, at the shapes in use.
        boundary: The boundary tensors of the cut.
        copies: Ranks that compute each stage, 1 each by default.
    """
    total = 0
    for index, stages in boundary.consumers.items():
        total += graph.values[index].num_bytes * sum(1 if copies is None else copies[stage] for stage in stages)
    return total
