"""The ranks themselves, over gloo: each scenario gives to the bit what all ranks in one process give.

With patches all but for rounding: one process computes the rows of all patches at once.

Processes are dear: one world of 2, one of 3 and one of 4 ranks, in each of which all its scenarios are played.
"""

import pytest
import reference
import torch.distributed as dist
from patch_scenarios import PATCH_CHECKS, PATCHES
from pipeline_scenarios import PIPELINES
from ranks import run_ranks, same
from recorded_scenarios import RECORDED, RECORDED_CHECKS
from relay_scenarios import RELAY_CHECKS, RELAYS
from stage_scenarios import STAGE_CHECKS, STAGES, two_data_groups
from traces import known_traces, shared_traces, take_traces

WORLDS = (2, 3, 4)
SCENARIOS = {size: [*STAGES[size], *RELAYS[size], *RECORDED[size], *PIPELINES[size]] for size in WORLDS}
ALL_CHECKS = (STAGE_CHECKS, RELAY_CHECKS, RECORDED_CHECKS, PATCH_CHECKS)
CHECKS = {size: [check for checks in ALL_CHECKS for check in checks.get(size, [])] for size in WORLDS}


def play(rank, world_size, expected, traces):
    take_traces(traces)
    with shared_traces():
        for scenario in SCENARIOS[world_size]:
            same(scenario.__name__, scenario(simulate=False), expected[scenario.__name__])
        for key in reference.keys(world_size)[::3]:
            same(key, [reference.run(key, simulate=False)], expected[key])
        for scenario in PATCHES[world_size]:
            near(scenario.__name__, scenario(simulate=False), expected[scenario.__name__])
        for check in CHECKS[world_size]:
            check(rank)
    if world_size == 4:
        same("two data groups", two_data_groups(rank // 2, simulate=False), expected["groups"][rank // 2])


def near(name, found, expected):
    assert len(found) == len(expected), name
    for at, (latents, simulated) in enumerate(zip(found, expected, strict=True)):
        error = float((latents - simulated).norm() / simulated.norm())
        assert error < 1e-5, f"{name}, sample {at}: rank {dist.get_rank()} is {error:.1e} from the simulation"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.filterwarnings("ignore:The denoiser's inputs changed", "ignore::DeprecationWarning")
def test_ranks(world_size):
    scenarios = SCENARIOS[world_size] + PATCHES[world_size]
    expected = {scenario.__name__: scenario(simulate=True) for scenario in scenarios}
    # within the bound of the original's latents: test_parity.py
    expected |= {key: [reference.simulated(key)] for key in reference.keys(world_size)[::3]}
    if world_size == 4:
        expected["groups"] = [two_data_groups(group, simulate=True) for group in range(2)]
    run_ranks(world_size, play, world_size, expected, known_traces())
