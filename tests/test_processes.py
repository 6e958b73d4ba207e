"""How processes end: each case in a process of its own, which imports nothing heavy."""

import os
import signal
import subprocess
import sys
import time

import pytest

from asyncdiff_pl.processes import own_rank

PATIENCE = "import asyncdiff_pl.processes as p; p.PATIENCE = p.NODE_PATIENCE = p.GRACE = 0.5; "
BAD_INPUT = "from asyncdiff_pl.cli.overview import find_config; find_config('nowhere')"


def run(code, **environment):
    code = PATIENCE + f"\ntry:\n    {code}\nexcept BaseException as error:\n    p.report_and_exit(error)"
    started = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k} | environment
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return process.returncode, process.stderr, time.monotonic() - started


def test_bad_input_ends_in_one_sentence():
    status, said, seconds = run(BAD_INPUT)
    assert status == 2
    assert said.startswith("asyncdiff_pl: error: There is no config nowhere; give a YAML file")
    assert said.count("\n") == 1
    assert seconds < 0.5


def test_the_sentences_origin_is_shown_on_demand():
    status, said, _ = run(BAD_INPUT, ASYNCDIFF_PL_TRACEBACK="1")
    assert status == 2
    assert "find_config" in said
    assert "Traceback" in said


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise RuntimeError('a defect')", 1, "RuntimeError: a defect"),
        ("int('x')", 1, "ValueError: invalid literal"),  # not written for users
        ("raise KeyboardInterrupt", 130, "asyncdiff_pl: stopped"),
        ("raise p.Terminated", 143, "asyncdiff_pl: stopped"),
        ("raise p.RankFailedError(status=2)", 2, ""),
        (
            "raise p.RankFailedError('The process of rank 1 was killed')",
            1,
            "asyncdiff_pl: error: The process of rank 1",
        ),
        ("raise SystemExit(0)", 0, ""),
        (
            "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA')",
            1,
            "error: rank 0 has no GPU memory left; take",
        ),
        ("raise type('MisconfigurationException', (Exception,), {})('No\\ngpu')", 2, "asyncdiff_pl: error: No gpu"),
    ],
)
def test_other_ends(code, status, said):
    found, text, _ = run(code)
    assert found == status
    assert said in text if said else not text
    assert ("Traceback" in text) == said.startswith(("RuntimeError", "ValueError"))


def test_an_interrupted_run_of_lightnings():
    code = "import sys\n    try: raise {}\n    except KeyboardInterrupt: sys.exit(1)"
    assert run(code.format("KeyboardInterrupt"))[:2] == (130, "")
    assert run(code.format("p.Terminated"))[:2] == (143, "")


def test_ranks_that_are_not_connected_leave_the_word_to_rank_0():
    # nobody ends them here, so they say it themselves in the end
    for environment in ({"RANK": "1", "LOCAL_RANK": "1"}, {"RANK": "2", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}):
        status, said, seconds = run(BAD_INPUT, **environment)
        assert (status, said.count("error")) == (2, 1)
        assert seconds > 0.5


def test_the_first_rank_to_fail_does_not_wait():
    code = "error = ValueError('x'); error.add_note(p.FIRST_TO_FAIL); p.exit_status = lambda error: 2; raise error"
    status, said, seconds = run(code, LOCAL_RANK="1")
    assert (status, said) == (2, "asyncdiff_pl: error: x\n")
    assert seconds < 0.5


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "1"}, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}])
def test_a_rank_dies_with_the_process_that_started_it(environment):
    child = f"import os, time; os.environ.update({environment}); from asyncdiff_pl.processes import die_with_parent; "
    child += "die_with_parent(); print('ready', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True); "
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert is_running(pid)
    process.kill()
    process.wait()
    assert wait_for(lambda: not is_running(pid))


STUCK = """
import ctypes
p.heed_signals()
lib, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
lib.pthread_mutex_lock(mutex)
print("ready", flush=True)
lib.pthread_mutex_lock(mutex)  # other threads go on, but no signal is handled
"""


@pytest.mark.parametrize(
    ("environment", "number", "status"),
    [
        ({}, signal.SIGINT, 130),
        ({}, signal.SIGTERM, 143),
        # killed by the signal itself
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, signal.SIGINT, -signal.SIGINT),
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, signal.SIGTERM, -signal.SIGTERM),
        ({"LOCAL_RANK": "1"}, signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_signals_end_a_rank_even_if_it_is_stuck(environment, number, status):
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k} | environment
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENCE + STUCK], stdout=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.readline()
    # between the line and the lock it is not stuck yet: a signal would be handled there
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(timeout=10) == status


def test_ctrl_c_is_left_to_rank_0_of_the_own_launcher():
    code = PATIENCE + "p.heed_signals(); print('ready', flush=True); p.time.sleep(0.5); print('alive')"
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k} | {"LOCAL_RANK": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "alive\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"RANK": "3", "LOCAL_RANK": "1"}, 3), ({"SLURM_PROCID": "2"}, 2)],
)
def test_own_rank(monkeypatch, environment, rank):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_rank() == rank
