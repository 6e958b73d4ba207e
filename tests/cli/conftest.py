"""Runs the command: within this process where nothing starts other ranks, else as a user does."""

import contextlib
import csv
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.overview import with_named_configs

SMALL = (
    *("--data.height", "64", "--data.width", "64", "--model.num_frames", "2"),
    *("--model.num_inference_steps", "4", "--data.max_images", "6"),
)
FREE = ("seconds", "timed", "step_latency_ms")
"""Columns of samples.csv that differ from run to run."""


@dataclass
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def own_errors(self) -> list[str]:
        return re.findall(r"^asyncdiff_pl: error: .*$", self.err, re.MULTILINE)

    @property
    def own_tracebacks(self) -> list[str]:
        """Lines of tracebacks that go through this package; torchrun writes some of its own."""
        return [line for line in self.err.splitlines() if "asyncdiff_pl/" in line and line.lstrip().startswith("File ")]


class LogFolder:
    """What a run wrote."""

    def __init__(self, path):
        self.path = Path(path)

    def table(self, name):
        with (self.path / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def samples(self):
        """The rows of samples.csv without what differs from run to run."""
        return [{k: v for k, v in row.items() if k not in FREE} for row in self.table("samples.csv")]

    def pictures(self):
        """Content of each frame, by its path."""
        frames = self.path / "frames"
        return {path.relative_to(frames).as_posix(): path.read_bytes() for path in sorted(frames.rglob("*.png"))}

    def rows_so_far(self):
        parts = self.path.glob("samples.part*.csv")
        return sum(max(0, part.read_text().count("\n") - 1) for part in parts)


class Command:
    """`predict --config demo` at a small size, its log folders below one folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def arguments(self, *more, name="run", config="demo"):
        logger = ("--trainer.logger.save_dir", str(self.folder), "--trainer.logger.name", name)
        return ["predict", "--config", str(config), *SMALL, *logger, *more]

    def log(self, name="run", version=0):
        return LogFolder(self.folder / name / f"version_{version}")

    def here(self, *more, **kwargs):
        """Runs it within this process."""
        run(with_named_configs(self.arguments(*more, **kwargs)))

    def start(self, arguments, launcher=(sys.executable,), **kwargs):
        """Starts it as a process, one thread a rank, so that any number of ranks gives the same numbers."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
            environment.pop(name, None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen([*launcher, "-m", "asyncdiff_pl", *arguments], env=environment, **pipes, **kwargs)

    def finish(self, process, timeout=120):
        started = time.monotonic()
        out, err = process.communicate(timeout=timeout)
        return Outcome(process.returncode, out, err, time.monotonic() - started)

    def as_user(self, *more, launcher=(sys.executable,), **kwargs):
        """Runs it as a process and waits for its end."""
        return self.finish(self.start(self.arguments(*more, **kwargs), launcher))

    def processes_left(self):
        """Command lines of processes that still run something in this folder, after a moment to end in."""
        for _ in range(20):
            found = [line for line in _command_lines() if str(self.folder) in line and "asyncdiff_pl" in line]
            if not found:
                break
            time.sleep(0.1)
        return found


def _command_lines():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue  # it ended just now
    return found


@contextlib.contextmanager
def within_this_process(folder):
    with pytest.MonkeyPatch.context() as patch:
        # Lightning sets both for the ranks that it would start
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(sys, "argv", ["asyncdiff_pl"])
        yield Command(folder)
    rank_zero_only.rank = 0


@pytest.fixture(scope="session")
def apart():
    """Makes commands in folders of their own, for what several tests share."""
    return within_this_process


@pytest.fixture
def command(tmp_path):
    with within_this_process(tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A run over all six pictures in 2 stages, of one process that plays both ranks; nothing stopped it."""
    # as on ranks: sums are grouped by threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with within_this_process(tmp_path_factory.mktemp("reference")) as found:
        found.here("--trainer.devices", "1", "--trainer.strategy.simulate", "true")
    torch.set_num_threads(threads)
    return found.log()


@pytest.fixture
def torchrun():
    """Starts two ranks on this machine, on a port of its own choosing."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
