"""The command: `python -m asyncdiff_pl predict --config configs/demo.yaml`."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

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
        command = _import(arguments[0] if arguments[0] in OTHERS else "command")
        if arguments[0] in OTHERS:
            getattr(command, f"run_{arguments[0]}")(arguments[1:])
        else:
            command.run(arguments)
    except BaseException as error:
        report_and_exit(error)


def _import(name: str) -> ModuleType:
    """A module of `cli`, with what it needs; warnings and logs are set up before."""
    # what is imported stays, and to look through it for garbage again and again is a fifth of the time
    gc.disable()
    importlib.import_module("asyncdiff_pl.cli.terminal").tidy()
    module = importlib.import_module(f"asyncdiff_pl.cli.{name}")
    gc.freeze()
    gc.enable()
    return module


if __name__ == "__main__":
    main()
