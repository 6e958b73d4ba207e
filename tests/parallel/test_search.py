"""The choice of a layout, as tables; no process is started."""

import dataclasses

import pytest
from torch.utils._pytree import tree_flatten

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.search import Candidate, candidates, choose, counted_costs, explain, predict, table
from asyncdiff_pl.parallel.stages.units import LATENTS, Graph, Leaf, Output, Unit, Value

MIB = 2**20
FAST = 1e18
"""A bandwidth with which messages cost nothing."""


def chain(units):
    """A denoiser whose units come one after another; each makes a MiB."""
    found = [
        Unit(f"unit{i}", 10**9, {i - 1 if i else LATENTS}, [Output(tree_flatten(0)[1], (Leaf(value=i),), (0,))])
        for i in range(units)
    ]
    return Graph(found, [Value(i, i, (2**18,), MIB) for i in range(units)], {}, frozenset({units - 1}))


def foreseen(layout, units=8, costs=None, steps=((25, 3),), bandwidth=FAST):
    return predict(layout, chain(units), costs or [10**7] * units, steps, bandwidth, False)


@pytest.mark.parametrize(
    ("num_ranks", "is_guided", "layouts"),
    [
        (1, True, [Layout(1)]),
        (2, True, [Layout(1, cfg=2), Layout(2)]),
        (3, True, [Layout(3)]),
        (4, True, [Layout(2, cfg=2), Layout(4)]),
        (4, False, [Layout(4)]),
        (4, None, [Layout(4)]),
        (8, True, [Layout(4, cfg=2), Layout(8)]),
        (12, True, [Layout(6, cfg=2)]),
        (9, True, []),
        (16, False, []),
        (32, True, []),
    ],
)
def test_layouts_that_use_all_ranks(num_ranks, is_guided, layouts):
    assert candidates(num_ranks, is_guided) == layouts


@pytest.mark.parametrize(
    ("stages", "shares", "staleness", "stale_mib"),
    [
        (1, (1.0,), 0.0, 0),
        (2, (0.5, 0.5), 0.5, 1),
        # three boundaries: thrice as stale as one
        (4, (0.25, 0.25, 0.25, 0.25), 1.5, 3),
    ],
)
def test_stages_of_a_chain(stages, shares, staleness, stale_mib):
    found = foreseen(Layout(stages))
    assert found.shares == shares
    assert found.staleness == staleness
    assert found.stale_bytes == stale_mib * MIB
    assert (found.exact_ms, found.asynchronous_ms) == (80.0, 80.0 / stages)
    # 3 exact steps of 25
    assert found.seconds == pytest.approx(25 * 0.08 if stages == 1 else 3 * 0.08 + 22 * 0.08 / stages)


def test_the_slowest_stage_decides():
    found = foreseen(Layout(2), units=3, costs=[10**6, 10**6, 10**7])
    assert found.asynchronous_ms == 10.0
    assert max(found.shares) == pytest.approx(10 / 12)
    # two units work from latents of this step, the large one from those of the step before
    assert found.staleness == pytest.approx(10 / 12)


@pytest.mark.parametrize(("bandwidth", "ms"), [(MIB * 1000, 20.0), (MIB * 10, 100.0)])
def test_messages_hide_behind_the_computation_as_far_as_they_can(bandwidth, ms):
    assert foreseen(Layout(4), bandwidth=bandwidth).asynchronous_ms == ms


def test_step_counts_in_the_mean():
    # of 2 steps both are exact
    found = foreseen(Layout(4), steps=[(2, 3), (10, 3)])
    assert found.seconds == pytest.approx((2 * 0.08 + 3 * 0.08 + 7 * 0.02) / 2)


def test_operations_at_a_rate():
    assert counted_costs(chain(3), 2e12) == [500_000] * 3


def candidate(stages, cfg, seconds, staleness):
    return Candidate(Layout(stages, cfg=cfg), seconds, 1e3, 1e2, (1 / stages,) * stages, staleness, MIB)


@pytest.mark.parametrize(
    ("two", "four", "chosen", "reason"),
    [
        ((1.0, 0.5), (1.5, 1.5), 2, "cfg 2 x 2 stages takes 0.67 of the time of 4 stages, and what stages see is 0.5"),
        ((1.05, 0.5), (1.0, 1.5), 2, "takes 1.05 of the time of 4 stages, which is near enough, and what stages see"),
        ((1.2, 0.5), (1.0, 1.5), 4, "4 stages takes 0.83 of the time of cfg 2 x 2 stages."),
        ((1.0, 0.0), (1.0, 1.5), 2, "and it is exact."),
        ((1.05, 1.5), (1.0, 1.5), 4, "4 stages takes 0.95 of the time of cfg 2 x 2 stages."),
    ],
)
def test_the_fastest_wins_unless_another_is_nearly_as_fast_and_newer(two, four, chosen, reason):
    found = [candidate(2, 2, *two), candidate(4, 1, *four)]
    best = choose(found)
    assert best.layout.stages == chosen
    assert reason in explain(found, best)


def test_the_only_one():
    found = [candidate(3, 1, 1.0, 1.0)]
    assert explain(found, choose(found)) == "3 stages is the only layout that fits."


def test_the_table_has_the_fastest_first_and_a_mark():
    found = [candidate(4, 1, 1.5, 1.5), dataclasses.replace(candidate(2, 2, 1.0, 0.5), stale_bytes=3 * MIB)]
    lines = [line.split() for line in table(found, found[1]).splitlines()]
    assert lines[1] == ["*", "cfg", "2", "x", "2", "stages", "1", "1000", "100", "50%", "0.5", "3"]
    assert lines[2] == ["4", "stages", "1.5", "1000", "100", "25%", "1.5", "1"]
