"""`report`: many runs side by side, and what to run."""

from __future__ import annotations

from asyncdiff_pl.cli.compare import Parser
from asyncdiff_pl.cli.overview import PROGRAM

DESCRIPTION = """\
Reports on runs from their log folders alone: a page (report.html) with a table, plots and pictures of all layouts, what
to run on how many GPUs, and how; the table (report.csv) and the plots (PNG) as files of their own."""


class ReportParser(Parser):
    """Ends bad arguments in one sentence."""

    command = "report"
    takes = f"log folders: {PROGRAM} report RUN [RUN ...]"


def run_report(arguments: list[str]) -> None:
    """Runs `report` and prints what it recommends.

    Args:
        arguments: What stands behind `report`.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    from asyncdiff_pl.report.report import report

    parser = ReportParser(usage=f"{PROGRAM} report RUN... [--SETTING VALUE ...]", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Log folders of `predict`, or the folder of a sweep.")
    parser.add_function_arguments(report, skip={"runs"})
    print(report(**parser.parse_args(arguments).as_dict()))
