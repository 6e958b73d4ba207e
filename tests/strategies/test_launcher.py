"""Which rank speaks when several fail, and that the main process ends with the others."""

import json
import subprocess
import sys

import pytest
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment

from asyncdiff_pl.processes import FIRST_TO_FAIL, RankFailedError
from asyncdiff_pl.strategies import launcher as launcher_module
from asyncdiff_pl.strategies.launcher import GroupLauncher, first_to_fail


class OneOfTwo(LightningEnvironment):
    """Ranks that somebody else has started."""

    creates_processes_externally = True


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return GroupLauncher(OneOfTwo(), num_processes=1, num_nodes=1)


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process one rank of a connected world."""
    store = dist.HashStore()
    monkeypatch.setattr(launcher_module, "_distributed_is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def become(rank):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)

    return become


def fail(error):
    raise error


def test_only_the_first_rank_to_fail_speaks(launcher, as_rank):
    as_rank(1)
    with pytest.raises(ValueError, match="bad input") as first:
        launcher.launch(fail, ValueError("bad input"))
    assert first.value.__notes__ == [FIRST_TO_FAIL]
    as_rank(0)
    with pytest.raises(RankFailedError) as second:
        launcher.launch(fail, RuntimeError("connection closed by peer"))
    assert str(second.value) == ""
    assert str(second.value.__cause__) == "connection closed by peer"


def test_the_status_is_that_of_the_first_rank(as_rank):
    as_rank(2)
    assert first_to_fail(2) == (2, 2)
    as_rank(0)
    assert first_to_fail(1) == (2, 2)


def test_torchruns_next_attempt_starts_anew(as_rank, monkeypatch):
    as_rank(2)
    assert first_to_fail(1) == (2, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    as_rank(0)
    assert first_to_fail(1) == (0, 1)


def test_a_store_that_is_gone_went_with_rank_0(as_rank, monkeypatch):
    def gone():
        raise dist.DistNetworkError("connection reset")

    as_rank(1)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    assert first_to_fail(1) == (0, 1)


def test_an_error_of_ranks_that_are_not_connected_is_left_alone(launcher):
    with pytest.raises(ValueError, match="bad input") as error:
        launcher.launch(fail, ValueError("bad input"))
    assert not hasattr(error.value, "__notes__")


def test_a_killed_rank_cannot_say_so_itself(launcher):
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    launcher.procs = [running, killed]
    killed.kill()
    with pytest.raises(RankFailedError, match=r"The process of rank 2 was killed \(SIGKILL\), as the system does"):
        launcher.launch(fail, RuntimeError("connection closed by peer"))
    launcher.kill(9)
    running.wait()


END = """
import json, os, subprocess, sys, time
from asyncdiff_pl.strategies import launcher
from lightning.pytorch.plugins.environments import LightningEnvironment
launcher.GRACE = 0.2
class Launcher(launcher.GroupLauncher):
    def _call_children_scripts(self):
        self.procs = [subprocess.Popen([sys.executable, "-c", code]) for code in children]
statuses = []
for children, seconds in json.loads(sys.argv[1]):
    # imports take seconds: once for all of them
    main = os.fork()
    if main == 0:
        Launcher(LightningEnvironment(), 3, 1).launch(time.sleep, seconds)
        print("the end", flush=True)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(main, 0)[1]))
print(statuses)
"""


def test_the_main_process_ends_with_the_others_even_if_it_hangs():
    cases = [
        (["", "raise SystemExit(2)"], 60, 2),
        (["", "import os; os.kill(os.getpid(), 9)"], 60, 1),
        (["", ""], 1, 0),
    ]
    command = [sys.executable, "-c", END, json.dumps([case[:2] for case in cases])]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.stdout.splitlines() == ["the end", str([status for *_, status in cases])], process.stderr
    assert "asyncdiff_pl: error: The process of rank 2 was killed" in process.stderr
