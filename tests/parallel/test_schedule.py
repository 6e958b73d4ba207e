"""The schedule, as tables."""

import itertools

import pytest

from asyncdiff_pl.parallel.stages.schedule import StepPlan, plan_step
from asyncdiff_pl.parallel.warm_up import count_exact


def row(plan: StepPlan) -> str:
    """A plan in one line: what each rank computes (stage@step of the timestep), the estimate's rank, what is sent."""
    if plan.is_exact:
        return "fills" if plan.fills else "exact"
    turns = " ".join("-" if turn is None else f"{turn.stage}@{turn.timestep}" for turn in plan.turns)
    return f"{turns} | {plan.estimate_from}{'' if plan.is_new else ' kept'}{' sends' if plan.exchanges else ''}"


TABLES = [
    pytest.param(
        {"stages": 2, "warm_up": 1},
        ["fills", "0@1 1@1 | 1 sends", "0@2 1@2 | 1 sends", "0@3 1@3 | 1"],
        id="stride 1: every step, nothing sent in the last",
    ),
    pytest.param(
        {"stages": 3, "warm_up": 2, "time_shift": True},
        ["exact", "fills", "0@1 1@1 2@1 | 2 sends", "0@2 1@2 2@2 | 2 sends", "0@3 1@3 2@3 | 2"],
        id="stride 1 with time_shift",
    ),
    pytest.param(
        {"stages": 3, "warm_up": 1, "output_stage": 0},
        ["fills", "0@1 1@1 2@1 | 0 sends", "0@2 1@2 2@2 | 0"],
        id="stride 1, the first stage makes the result",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 1},
        ["fills", "0@2 1@2 1@1 | 2 sends", "- - - | 1 kept", "0@4 1@4 1@3 | 2", "- - - | 1 kept"],
        id="stride 2, odd warm_up, whole rounds",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 2},
        ["exact", "fills", "0@3 1@3 1@2 | 2 sends", "- - - | 1 kept", "- - 1@4 | 2"],
        id="stride 2, even warm_up: the last round is half a round, for which nobody runs ahead",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 3, "time_shift": True},
        ["exact", "exact", "fills", "0@3 1@3 1@2 | 2 sends", "- - - | 1 kept", "0@5 1@5 1@4 | 2", "- - - | 1 kept"],
        id="stride 2 with time_shift",
    ),
    pytest.param(
        {"stages": 3, "stride": 2, "warm_up": 1, "output_stage": 1},
        ["fills", "0@2 1@2 2@2 1@1 | 3 sends", "- - - - | 1 kept", "- - - 1@3 | 3"],
        id="stride 2, the second stage makes the result",
    ),
    pytest.param({"stages": 1, "warm_up": 1}, ["exact"] * 3, id="one stage"),
    pytest.param({"stages": 4, "warm_up": 5}, ["exact"] * 3, id="shorter than its warm-up"),
    pytest.param({"stages": 4, "warm_up": 3}, ["exact", "exact", "fills"], id="as long as its warm-up"),
    pytest.param({"stages": 2, "warm_up": 2}, ["exact", "fills", "0@2 1@2 | 1"], id="one asynchronous step"),
    pytest.param({"stages": 2, "warm_up": None}, ["fills"] * 3, id="a warm-up whose end is not known"),
    pytest.param({"stages": 1, "warm_up": None}, ["exact"] * 3, id="one stage, whose warm-up has no end"),
    pytest.param(
        {"stages": 2, "warm_up": 1, "refresh_every": 3},
        [
            *("fills", "0@1 1@1 | 1 sends", "0@2 1@2 | 1", "fills"),
            *("0@4 1@4 | 1 sends", "0@5 1@5 | 1", "fills", "0@7 1@7 | 1"),
        ],
        id="refreshes: nothing is sent for them",
    ),
    pytest.param(
        {"stages": 2, "warm_up": 2, "refresh_every": 2, "time_shift": True},
        ["exact", "fills", "0@1 1@1 | 1", "fills", "0@3 1@3 | 1", "fills"],
        id="each second step a refresh, to the end",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 1, "refresh_every": 5},
        [
            *("fills", "0@2 1@2 1@1 | 2 sends", "- - - | 1 kept", "0@4 1@4 1@3 | 2", "- - - | 1 kept"),
            *("fills", "0@7 1@7 1@6 | 2 sends", "- - - | 1 kept", "0@9 1@9 1@8 | 2", "- - - | 1 kept"),
        ],
        id="stride 2, whole rounds between refreshes",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 1, "refresh_every": 4},
        [
            *("fills", "0@2 1@2 1@1 | 2 sends", "- - - | 1 kept", "- - 1@3 | 2"),
            *("fills", "0@6 1@6 1@5 | 2 sends", "- - - | 1 kept", "- - 1@7 | 2"),
            *("fills", "0@10 1@10 1@9 | 2", "- - - | 1 kept"),
        ],
        id="stride 2, half a round before a refresh, for which nobody runs ahead",
    ),
    pytest.param(
        {"stages": 2, "stride": 2, "warm_up": 1, "refresh_every": 2},
        ["fills", "- - 1@1 | 2", "fills", "- - 1@3 | 2"],
        id="stride 2, no room for a whole round",
    ),
]


@pytest.mark.parametrize(("settings", "expected"), TABLES)
def test_sample(settings, expected):
    assert [row(plan_step(step, len(expected), **settings)) for step in range(len(expected))] == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("step", [6, 7, 8])
def test_steps_beyond_the_announced_number_are_exact(step, stride):
    assert plan_step(step, 6, stages=2, stride=stride, warm_up=1).is_exact


@pytest.mark.parametrize("warm_up", [1, 2, 3, 4])
@pytest.mark.parametrize("num_steps", [3, 6, 9, 10])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("refresh_every", [None, 2, 3, 4, 5])
def test_what_is_used_was_made(num_steps, warm_up, stride, refresh_every):
    """An estimate is kept only where the step before made one, and each round finds what the last one sent."""
    settings = {"stages": 3, "stride": stride, "warm_up": warm_up, "refresh_every": refresh_every}
    plans = [plan_step(s, num_steps, **settings) for s in range(num_steps)]
    assert sum(plan.is_exact for plan in plans) == count_exact(warm_up, refresh_every, num_steps)
    for is_exact, group in itertools.groupby(plans, key=lambda plan: plan.is_exact):
        run = list(group)
        if is_exact:
            # what comes before an asynchronous step fills its inputs
            assert run[-1].fills or run[-1] is plans[-1]
            continue
        working = [plan for plan in run if any(plan.turns)]
        assert all(plan.exchanges for plan in working[:-1])
        assert not any(plan.exchanges for plan in working[-1:])
    for before, plan in itertools.pairwise(plans):
        if not plan.is_exact and not plan.is_new:
            assert before.turns[plan.estimate_from] is not None
        if not plan.is_exact and plan.is_new:
            assert plan.turns[plan.estimate_from] is not None
