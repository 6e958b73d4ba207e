"""The command: `python -m asyncdiff_pl predict --config configs/demo.yaml`."""

from __future__ import annotations

import importlib
import sys

from asyncdiff_pl.cli.overview import overview, with_named_configs
from asyncdiff_pl.processes import GRACE, TRAINING_GRACE, die_with_parent, heed_signals, report_and_exit

OTHERS = ("compare", "plan", "report", "sweep", "test")
"""Subcommands that are not Lightning's: each has a module of its name in `cli`, and there a function `run_<name>`."""


def main() -> None:
    """Runs the command line; bad input ends in one sentence and exit status 2."""
    die_with_parent()
    arguments = sys.argv[1:]
    heed_signals(TRAINING_GRACE if arguments[:1] == ["fit"] else GRACE)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if arguments else 2)
    try:
        arguments = with_named_configs(arguments)
        # seconds of imports: help and a wrong name should not wait for them
        from asyncdiff_pl.cli.terminal import tidy

        tidy()
        if arguments[0] in OTHERS:
            module = importlib.import_module(f"asyncdiff_pl.cli.{arguments[0]}")
            getattr(module, f"run_{arguments[0]}")(arguments[1:])
            return
        from asyncdiff_pl.cli.command import run

        run(arguments)
    except BaseException as error:
        report_and_exit(error)


if __name__ == "__main__":
    main()
