"""`sweep`: a grid of layouts over the same samples, and its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import NoReturn

from typing_extensions import override

from asyncdiff_pl.cli.overview import PROGRAM

DESCRIPTION = """\
Runs a grid of strategies, settings and step counts over the same samples, each cell by `predict` in a log folder of its
own, one device always among them, and then `report`. The same command goes on with a sweep that was stopped: finished
cells are kept, and one that was running goes on with the samples that are missing. A cell that fails is told of, and
the others run. Other arguments are settings of `predict` for all cells: --data.images_dir DIR, say."""


class Parser(argparse.ArgumentParser):
    """Leaves the settings of `predict` as they are, and ends bad arguments in one sentence."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `sweep --help` explains.")


def run_sweep(arguments: list[str]) -> None:
    """Runs `sweep`; the process ends with status 1 if cells failed.

    Args:
        arguments: What stands behind `sweep`, configs by their paths.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    usage = f"{PROGRAM} sweep --config CONFIG [--folder FOLDER] [--SETTING VALUE ...]"
    parser = Parser(usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", help="A sweep's YAML file, or the name of a packaged one.")
    parser.add_argument("--folder", help="Folder for the log folders of the cells; default: lightning_logs/CONFIG.")
    given, more = parser.parse_known_args(arguments)
    if given.config is None:
        raise ValueError(f"sweep takes a config: {PROGRAM} sweep --config sweep_demo.")

    from asyncdiff_pl.report.grid import read_sweep
    from asyncdiff_pl.report.plots import check_matplotlib
    from asyncdiff_pl.report.report import report
    from asyncdiff_pl.report.sweep import check_alone, run_cells

    check_alone()
    check_matplotlib()
    sweep = read_sweep(given.config, given.folder)
    rows = run_cells(sweep, more, again=f"{PROGRAM} sweep {shlex.join(arguments)}")
    print(report([str(sweep.folder)], output=str(sweep.folder / "report")))
    if any(row["state"] != "finished" for row in rows):
        sys.exit(1)
