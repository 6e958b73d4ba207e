"""Draws which rank computes which stage for which step, as the package's own schedule says (needs matplotlib).

    python scripts/plot_schedule.py docs/images/schedule.png

Time goes to the right. Each stage takes its share of a whole step, and messages take no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from asyncdiff_pl.parallel.stages.schedule import StepPlan, plan_step
from asyncdiff_pl.parallel.steps.settings import round_of

STAGES = ("#56B4E9", "#F0C05A", "#7FC8A9", "#D9A0C4")
WHOLE = "#C9CCD1"
ESTIMATE = "#B22222"
HEIGHT = 0.74
"""Height of a box, of a rank's line."""


@dataclass(frozen=True)
class Box:
    """What a rank computes at one go.

    Args:
        rank: The rank.
        begin: When it begins, in whole steps of one rank.
        width: How long it takes, in the same.
        stage: The stage; None for the whole denoiser.
        step: Step whose timestep the denoiser is given.
        is_estimate: Whether what comes out is the noise estimate of a step.
    """

    rank: int
    begin: float
    width: float
    stage: int | None
    step: int
    is_estimate: bool


@dataclass(frozen=True)
class Example:
    """A schedule to draw.

    Args:
        title: What it is called.
        num_steps: Steps of the sample.
        stages: Number of stages.
        stride: Steps of a round of the stages.
        refresh_every: Each how many-th step after warm-up is exact again.
        at_once: Steps that are computed at a time, each by a rank, in place of stages.
        warm_up: Exact steps at the start.
    """

    title: str
    num_steps: int
    stages: int = 1
    stride: int = 1
    refresh_every: int | None = None
    at_once: int = 1
    warm_up: int = 2

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline."""
        return self.at_once if self.at_once > 1 else self.stages + self.stride - 1


EXAMPLES = (
    Example("3 stages", 10, stages=3),
    Example("3 stages, refresh_every 4", 10, stages=3, refresh_every=4),
    Example("2 stages, stride 2", 10, stages=2, stride=2),
    Example("for comparison: 3 steps at a time", 10, at_once=3),
)


def boxes_of(example: Example) -> tuple[list[Box], list[tuple[Box, Box]], float]:
    """What each rank computes when.

    Returns:
        The boxes, pairs of those between which boundary tensors travel to the next stage, and when the sample ends.
    """
    boxes: list[Box] = []
    messages: list[tuple[Box, Box]] = []
    now, sent = 0.0, dict[int, Box]()
    for step in range(example.num_steps):
        if example.at_once > 1:
            together = round_of(step, example.num_steps, example.at_once, example.warm_up)
            if together is None:
                boxes += [Box(rank, now, 1, None, step, rank == 0) for rank in range(example.ranks)]
                now += 1
            elif together.first == step:
                boxes += [Box(rank, now, 1, None, step + rank, True) for rank in range(together.size)]
                now += 1
            continue
        plan = _plan(example, step)
        if plan.is_exact:
            boxes += [Box(rank, now, 1, None, step, rank == 0) for rank in range(example.ranks)]
            sent = {}
            now += 1
            continue
        # in the second step of a round nobody computes: its estimate was made in the first
        ahead = _plan(example, step + 1) if example.stride == 2 and plan.is_new else None
        made: dict[int, Box] = {}
        for rank, turn in enumerate(plan.turns):
            if turn is None:
                continue
            is_estimate = rank == plan.estimate_from or (
                ahead is not None and not ahead.is_exact and not ahead.is_new and rank == ahead.estimate_from
            )
            box = Box(rank, now, 1 / example.stages, turn.stage, turn.timestep, is_estimate)
            if turn.stage - 1 in sent:
                messages.append((sent[turn.stage - 1], box))
            # the extra rank of stride 2 sends nothing
            if rank < example.stages:
                made[turn.stage] = box
            boxes.append(box)
        if made:
            sent = made
        now += 1 / example.stages if any(plan.turns) else 0
    return boxes, messages, now


def _plan(example: Example, step: int) -> StepPlan:
    return plan_step(
        step,
        example.num_steps,
        stages=example.stages,
        stride=example.stride,
        warm_up=example.warm_up,
        refresh_every=example.refresh_every,
    )


def plot(examples: Sequence[Example], path: Path) -> None:
    """A panel for each schedule, on one scale of time.

    Args:
        examples: The schedules.
        path: PNG to write.
    """
    heights = [example.ranks + 0.9 for example in examples]
    figure, grid = plt.subplots(
        len(examples), 1, figsize=(10.5, 0.52 * sum(heights) + 0.9), dpi=150, squeeze=False, sharex=True,
        height_ratios=heights, facecolor="white",
    )  # fmt: skip
    longest = max(boxes_of(example)[-1] for example in examples)
    for axes, example in zip(grid[:, 0], examples, strict=True):
        boxes, messages, end = boxes_of(example)
        _draw(axes, example, boxes, messages)
        saved = f"{example.num_steps} steps in the time of {end:.1f}".replace(".0", "")
        axes.set_title(f"{example.title}: {example.ranks} ranks, {saved}", fontsize=12, loc="left")
        axes.set(xlim=(0, longest + 0.05), ylim=(example.ranks - 0.4, -0.55))
        axes.set_yticks(range(example.ranks), [f"rank {rank}" for rank in range(example.ranks)], fontsize=10)
        axes.tick_params(length=0)
        hidden = ["top", "right", "left"] if example is examples[-1] else ["top", "right", "left", "bottom"]
        axes.spines[hidden].set_visible(False)
    grid[-1, 0].set_xlabel("time, in whole steps of one rank", fontsize=11)
    labels = [("whole denoiser", WHOLE, "none"), *((f"stage {k}", STAGES[k], "none") for k in range(3))]
    labels.append(("gives a noise estimate", "white", ESTIMATE))
    handles = [Rectangle((0, 0), 1, 1, facecolor=face, edgecolor=edge, linewidth=1.8) for _, face, edge in labels]
    figure.legend(
        handles, [text for text, *_ in labels], ncols=5, loc="lower center", frameon=False, fontsize=11,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def _draw(axes: Axes, example: Example, boxes: Sequence[Box], messages: Sequence[tuple[Box, Box]]) -> None:
    for box in boxes:
        gap = 0.02
        place = box.begin + gap, box.rank - HEIGHT / 2
        colour = WHOLE if box.stage is None else STAGES[box.stage]
        edge = ESTIMATE if box.is_estimate else "none"
        axes.add_patch(
            Rectangle(place, box.width - 2 * gap, HEIGHT, facecolor=colour, edgecolor=edge, linewidth=1.8, zorder=2)
        )
        axes.text(box.begin + box.width / 2, box.rank, str(box.step), ha="center", va="center", fontsize=10, zorder=4)
    for sender, receiver in messages:
        ends = (sender.begin + sender.width - 0.05, sender.rank + 0.3), (receiver.begin + 0.05, receiver.rank - 0.3)
        axes.add_patch(
            FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=8, color="0.25", linewidth=0.9, zorder=3)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="PNG to write")
    plot(EXAMPLES, parser.parse_args().picture)


if __name__ == "__main__":
    main()
