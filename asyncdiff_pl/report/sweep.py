"""Runs the cells of a sweep one after another, each as a process of its own; one that was stopped goes on."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.callbacks.sample_table import Row, read_table, write_table
from asyncdiff_pl.cli.overview import PROGRAM
from asyncdiff_pl.processes import own_rank
from asyncdiff_pl.report.grid import Cell, Sweep
from asyncdiff_pl.report.run_folders import CELLS

COLUMNS = ("cell", "devices", "steps", "state", "seconds", "message", "digest")
"""Columns of sweep.csv; seconds are those of the latest start."""

PATIENCE = 8.0
"""Seconds that a cell has for ending by itself after Ctrl-C: less than the sweep itself has (processes.GRACE)."""

Start = Callable[[list[str], Path], "subprocess.Popen[bytes]"]
"""Starts a cell: what stands behind the program's name, and the file for what it says."""


def run_cells(sweep: Sweep, more: Sequence[str] = (), again: str = "", start: Start | None = None) -> list[Row]:
    """Runs all cells that are not finished, and keeps sweep.csv.

    A cell that fails is told of, and the others run. Those that were stopped go on with the samples that are missing.

    Args:
        sweep: The cells, and the folder for their log folders.
        more: Settings that are added to each cell's, as on the command line of `predict`.
        again: The command that goes on with the sweep after Ctrl-C.
        start: Starts a cell; None starts `predict`.

    Returns:
        The rows of sweep.csv.

    Raises:
        ValueError: Another sweep runs in the folder.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the cell that ran has ended.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with (sweep.folder / ".lock").open("w") as lock:
        try:
            # it is given back by the system, however this process ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another sweep is running in {sweep.folder}; wait for it, or give another folder."
            ) from error
        return _run_all(sweep, more, again, start or start_predict)


def _run_all(sweep: Sweep, more: Sequence[str], again: str, start: Start) -> list[Row]:
    before = {row["cell"]: row for row in read_table(sweep.folder / CELLS)}
    rows = [_row_before(cell, before.get(cell.name), cell.digest(more)) for cell in sweep.cells]
    for number, (cell, row) in enumerate(zip(sweep.cells, rows, strict=True), 1):
        place = f"[{number}/{len(rows)}] {cell.name}"
        if row["state"] == "finished":
            print(f"{place}: finished before", flush=True)
            continue
        row |= {"state": "stopped", "message": "", "seconds": ""}
        _write(sweep, rows)
        devices = "1 device" if cell.devices == 1 else f"{cell.devices} devices"
        print(f"{place}: started on {devices}", flush=True)
        began = time.monotonic()
        try:
            status = _run(sweep.folder, cell, more, start)
        except KeyboardInterrupt:
            row["seconds"] = f"{time.monotonic() - began:.0f}"
            _write(sweep, rows)
            finished = sum(row["state"] == "finished" for row in rows)
            print(f"{place}: stopped, after {finished} of {len(rows)} cells; what is done is kept.")
            if again:
                print(f"Go on with: {again}\nReport so far: {PROGRAM} report {sweep.folder}", flush=True)
            raise
        row["seconds"] = f"{time.monotonic() - began:.0f}"
        if status == 0:
            row["state"] = "finished"
            print(f"{place}: finished in {row['seconds']} s{_found(sweep.folder / cell.name)}", flush=True)
        else:
            row |= {"state": "failed", "message": _why(sweep.folder / f"{cell.name}.log", status)}
            print(f"{place}: failed, {row['message']}", flush=True)
        _write(sweep, rows)
    return rows


def start_predict(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the command as a process of its own that Ctrl-C does not reach by itself, and that dies with this one.

    Args:
        arguments: What stands behind the program's name.
        log: File that what it says is added to.
    """
    ranks = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "asyncdiff_pl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform.startswith("linux") else None,
        )


def check_alone() -> None:
    """Tells that a launcher started this: a sweep starts the ranks of its cells itself.

    Raises:
        ValueError: It is one of several ranks.
    """
    if own_rank() > 0 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A sweep starts the ranks of its cells itself; start it without torchrun, once on a machine.")


def _run(folder: Path, cell: Cell, more: Sequence[str], start: Start) -> int:
    """Runs one cell to its end and gives its exit status."""
    config = folder / f"{cell.name}.yaml"
    write_atomically(config, yaml.safe_dump(cell.config, sort_keys=False).encode())
    # the log folder is the cell's own: what it holds already is left out
    process = start(["predict", "--config", str(config), *more], folder / f"{cell.name}.log")
    try:
        return process.wait()
    except KeyboardInterrupt:
        # unlike SIGINT it is heeded by what was started in the background as well
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _row_before(cell: Cell, before: Row | None, digest: str) -> Row:
    """What is known of a cell: what an earlier sweep with the same settings came to."""
    row = {"cell": cell.name, "devices": str(cell.devices), "steps": str(cell.steps), "state": "not begun"}
    row |= {"seconds": "", "message": "", "digest": digest}
    return before if before is not None and before["digest"] == digest else row


def _write(sweep: Sweep, rows: Sequence[Row]) -> None:
    write_table(sweep.folder / CELLS, rows, COLUMNS)


def _found(folder: Path) -> str:
    """What a cell measured, in words."""
    parts = []
    for row in read_table(folder / "results.csv"):
        for column, text in (("avg_time", "{:.4g} s a sample"), ("avg_score", "score {:.4g}")):
            if row.get(column):
                parts.append(text.format(float(row[column])))
    return "".join(f", {part}" for part in parts)


def _why(log: Path, status: int) -> str:
    """Why a cell failed: its own sentence, or the last line that it said."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    mark = "asyncdiff_pl: error: "
    own = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    said = own[-1:] or lines[-1:]
    return f"{''.join(said) or f'exit status {status}'} (all that it said: {log})"


def _end_with_parent() -> None:
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
