"""Measured costs of units: what is timed, how a cut follows, how ranks agree, and what is kept on disk."""

import functools
import json
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from denoisers import Sampler, build, ddim
from ranks import run_ranks

from asyncdiff_pl import parallelize
from asyncdiff_pl.parallel.stages import costs, stopwatch
from asyncdiff_pl.parallel.stages.costs import measure
from asyncdiff_pl.parallel.stages.cut import cut_names, find_cut, resolve_cut
from asyncdiff_pl.parallel.stages.stopwatch import Clock, repeats
from asyncdiff_pl.parallel.stages.units import meta_twin, trace

NAME = "sd21"


class Table:
    """A stopwatch that reads a table: nanoseconds of units by the beginning of their names, 1000 for others.

    Args:
        times: Nanoseconds by names.
        glue: What each block takes beside its units, nanoseconds.
    """

    def __init__(self, times=None, glue=0):
        self.times, self.glue = times or {}, glue
        self.timed = []
        self._in_block = 0

    def __call__(self, name, run):
        run()
        self.timed.append(name)
        if re.fullmatch(r"(down|up)_blocks\.\d|mid_block", name):
            in_block, self._in_block = self._in_block, 0
            return in_block + self.glue
        found = next((ns for start, ns in self.times.items() if name.startswith(start)), 1000)
        self._in_block += found if "block" in name else 0
        return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path))
    return tmp_path / "costs"


def traced():
    sampler = Sampler(NAME)
    denoiser, latents = build(NAME), sampler.call(sampler.latents)
    return denoiser, graph(), (latents, torch.tensor(7)), sampler.kwargs


@functools.cache
def graph():
    sampler = Sampler(NAME)
    latents = sampler.call(sampler.latents)
    return trace(meta_twin(build(NAME)), (latents, torch.tensor(7)), sampler.kwargs, latents)


def measured(table, denoiser=None):
    own, graph, args, kwargs = traced()
    denoiser = denoiser or own
    return graph, measure(denoiser, denoiser.forward, graph, args, kwargs, table)


def sample(stages=2, size=8, dtype=torch.float32, **settings):
    """Runs a denoiser in stages by measured times and takes it apart again; gives its cut and costs."""
    denoiser, scheduler = build(NAME).to(dtype), ddim()
    handle = parallelize(
        denoiser, stages=stages, balance="measured", warm_up=1, scheduler=scheduler, **{"simulate": True, **settings}
    )
    sampler = Sampler(NAME, size=size)
    sampler.latents = sampler.latents.to(dtype)
    sampler.kwargs = {name: tensor.to(dtype) for name, tensor in sampler.kwargs.items()}
    sampler(denoiser, scheduler, steps=2)
    cut, found = handle.cut, handle.costs
    handle.remove()
    return cut, found


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_each_unit_is_timed_by_itself():
    times = {"conv_in": 77, "mid_block": 5, "up_blocks.0.resnets.1": 123456}
    table = Table(times)
    graph, found = measured(table)
    assert [name for name in table.timed if name in {unit.name for unit in graph.units}] == [
        u.name for u in graph.units
    ]
    expected = [next((ns for start, ns in times.items() if u.name.startswith(start)), 1000) for u in graph.units]
    assert found == expected


def test_glue_is_shared_out_by_the_size_of_what_units_make():
    glue = 10_000_000
    graph, found = measured(Table(glue=glue))
    plain = [1000] * len(found)
    for name, container in graph.containers.items():
        if name.count(".attentions") or name.count(".motion"):
            continue
        inside = sorted(container.units)
        added = {i: found[i] - plain[i] for i in inside}
        assert sum(added.values()) == pytest.approx(glue, abs=len(inside))
        sizes = {i: sum(v.num_bytes for v in graph.values if v.unit == i and not v.sources) for i in inside}
        for i in inside:
            assert added[i] == glue * sizes[i] // sum(sizes.values())
    outside = [i for i in range(len(found)) if not any(i in c.units for c in graph.containers.values())]
    assert [graph.units[i].name for i in outside] == ["conv_in", "conv_norm_out", "conv_out"]
    assert [found[i] for i in outside] == [1000] * 3


def test_a_block_that_is_faster_than_its_units_costs_nothing_beside_them():
    assert measured(Table(glue=-5000))[1] == measured(Table())[1]


def test_the_median_of_three_runs_counts(monkeypatch):
    marks = iter([0, 50, 100, 107, 200, 1000])
    monkeypatch.setattr(stopwatch.time, "perf_counter_ns", lambda: next(marks))
    runs = []
    assert Clock()("unit", lambda: runs.append(1)) == 50
    assert len(runs) == 3


@pytest.mark.parametrize(("ms", "times"), [(0.0, 20), (0.1, 20), (0.5, 10), (2.0, 2), (40.0, 1)])
def test_short_units_run_several_times_in_a_recording(ms, times):
    assert repeats(ms) == times


def test_the_clock_sees_a_slow_unit():
    denoiser, graph, args, kwargs = traced()
    slow = denoiser.mid_block.resnets[0]
    slow.register_forward_pre_hook(lambda *_: None)
    own = slow.forward
    slow.forward = lambda *given: (time.sleep(0.02), own(*given))[1]
    found = measure(denoiser, denoiser.forward, graph, args, kwargs, Clock())
    assert graph.units[found.index(max(found))].name == "mid_block.resnets.0"
    assert 20e6 < max(found) < 40e6


def test_nothing_is_left_on_the_denoiser():
    denoiser, graph, args, kwargs = traced()
    before = denoiser(*args, **kwargs).sample
    measure(denoiser, denoiser.forward, graph, args, kwargs, Table())
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert torch.equal(denoiser(*args, **kwargs).sample, before)


def put_away(module):
    module.to("meta")


def put_placeholders(module):
    for weight in module.parameters():
        weight.data = torch.zeros(()).expand(weight.shape)


@pytest.mark.parametrize("away", [put_away, put_placeholders])
def test_weights_that_are_elsewhere(away):
    denoiser, graph, args, kwargs = traced()
    away(denoiser.mid_block.resnets[0].conv1)
    with pytest.raises(ValueError, match=r"on cpu, but 2 of its weights are not there: measure with .* replicated"):
        measure(denoiser, denoiser.forward, graph, args, kwargs, Table())


# -- the cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "stages"),
    [
        ({}, 2),
        ({}, 3),
        ({"down_blocks": 10_000}, 2),
        ({"up_blocks": 10_000}, 2),
        ({"up_blocks.3": 50_000}, 3),
        ({"conv_out": 26_000}, 2),
    ],
)
def test_a_cut_balances_the_times(times, stages):
    graph, found = measured(Table(times))
    owner = find_cut(graph, stages, found)
    shares = [sum(ns for ns, k in zip(found, owner, strict=True) if k == stage) for stage in range(stages)]
    # no stage has more than its part and the largest unit
    assert max(shares) <= sum(found) / stages + max(found) / 2
    if times:
        assert owner != find_cut(graph, stages)


def cut_by(times, stages=2):
    """The cut of a denoiser whose units take so long."""
    graph, found = measured(Table(times))
    return cut_names(graph, find_cut(graph, stages, found))


def test_the_costs_that_a_cut_balances(monkeypatch):
    monkeypatch.setattr(costs, "stopwatch_for", lambda device: Table({"conv_out": 1_000_000}))
    cut, found = sample()
    assert cut == cut_by({"conv_out": 1_000_000})
    (last,) = [cost for cost in found if cost.unit == "conv_out"]
    assert last.ms == 1.0
    assert last.share == pytest.approx(1_000_000 / (1_000_000 + 1000 * (len(found) - 1)))
    assert [cost.stage for cost in found] == resolve_cut(traced()[1], cut)


def test_a_cut_that_is_given_is_not_measured(monkeypatch):
    monkeypatch.setattr(costs, "stopwatch_for", None)
    given = [["conv_in", "down_blocks"], ["mid_block", "up_blocks", "conv_norm_out", "conv_out"]]
    cut, found = sample(cut=given)
    assert found is None
    assert resolve_cut(traced()[1], cut) == resolve_cut(traced()[1], given)


# -- ranks ------------------------------------------------------------------------------------------------------------

TABLES = [{"conv_out": 1_000_000}, {"conv_in": 1_000_000}]


def in_two_stages(rank, folder):
    os.environ["ASYNCDIFF_PL_CACHE"] = f"{folder}/{rank}"
    costs.stopwatch_for = lambda device: Table(TABLES[rank])
    # two stages over the ranks: the first rank's clock counts
    found = [None, None]
    dist.all_gather_object(found, sample(simulate=False))
    assert found[0] == found[1]
    assert found[0][0] == cut_by(TABLES[0])
    assert os.path.isdir(f"{folder}/{rank}/costs") == (rank == 0)
    # each rank a pipeline of its own, which runs other samples: the one that is done first counts
    if rank == 1:
        dist.barrier()
    alone = sample(stages=3)
    if rank == 0:
        dist.barrier()
    dist.all_gather_object(found, alone)
    assert found[0] == found[1]
    assert found[0][0] == cut_by(TABLES[0], 3)


def test_ranks_with_different_clocks_come_to_one_cut(tmp_path):
    run_ranks(2, in_two_stages, str(tmp_path))


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    table = Table({"conv_out": 1_000_000})
    monkeypatch.setattr(costs, "stopwatch_for", lambda device: table)
    return table


@pytest.mark.parametrize(
    ("other", "is_measured"),
    [
        ({}, False),
        ({"stages": 3}, False),
        ({"size": 16}, True),
        ({"dtype": torch.float64}, True),
        ({"cfg": 2}, True),
    ],
)
def test_what_was_measured_once_is_read(clock, other, is_measured):
    first = sample()
    assert clock.timed
    clock.timed.clear()
    second = sample(**other)
    assert bool(clock.timed) is is_measured
    assert [cost.ms for cost in first[1]] == [cost.ms for cost in second[1]]


def test_another_version_is_measured_anew(clock, monkeypatch):
    sample()
    clock.timed.clear()
    monkeypatch.setattr(torch, "__version__", "9.9")
    sample()
    assert clock.timed


@pytest.mark.parametrize("content", ["", "[1]", '{"ns": {"conv_in": 5}}', '{"ns": 3}', "broken"])
def test_a_file_that_cannot_be_read_is_written_anew(clock, cache, content):
    first = sample()
    (path,) = cache.iterdir()
    written = path.read_text()
    path.write_text(content)
    clock.timed.clear()
    with pytest.warns(UserWarning, match="cannot be read .* they are measured anew"):
        assert sample() == first
    assert clock.timed
    assert path.read_text() == written


def test_what_is_kept_says_what_it_is(clock, cache):
    _, found = sample()
    (path,) = cache.iterdir()
    kept = json.loads(path.read_text())
    assert kept["ns"] == {cost.unit: round(1e6 * cost.ms) for cost in found}
    assert kept["conditions"]["denoiser"] == "UNet2DConditionModel"
    assert [[2, 4, 8, 8], "torch.float32"] in kept["conditions"]["inputs"]


def test_a_cache_that_cannot_be_written_is_a_warning(clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "file"))
    with pytest.warns(
        UserWarning, match="could not be kept in .*: the next run measures again; set ASYNCDIFF_PL_CACHE"
    ):
        sample()
