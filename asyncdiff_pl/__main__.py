"""The command: `python -m asyncdiff_pl predict --config configs/demo.yaml`."""

from __future__ import annotations

import sys

from asyncdiff_pl.processes import die_with_parent, report_and_exit


def main() -> None:
    """Runs the command line; bad input ends in one sentence and exit status 2."""
    die_with_parent()
    try:
        # seconds of imports: bad input of the shell's kind should not wait for a half-loaded command
        from asyncdiff_pl.cli import run

        run(sys.argv[1:])
    except Exception as error:
        report_and_exit(error)


if __name__ == "__main__":
    main()
