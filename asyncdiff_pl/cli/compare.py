"""`compare`: two runs, or two folders of pictures, side by side."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser
from typing_extensions import override

from asyncdiff_pl.cli.messages import one_sentence
from asyncdiff_pl.cli.overview import PROGRAM

DESCRIPTION = """\
Compares what run or folder B holds with A: PSNR, SSIM and more, sample by sample, and the times and scores of runs.
Writes a table (compare.csv, compare.md), the samples' own numbers (compare_samples.csv) and a sheet (compare.png)."""


class Parser(ArgumentParser):
    """Ends bad arguments in one sentence; a subclass says whose they are."""

    command = "compare"
    takes = f"two folders: {PROGRAM} compare A B"

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        if "required" in str(message):
            raise ValueError(f"{self.command} takes {self.takes}.") from ex
        raise ValueError(one_sentence(str(message), self.command)) from ex


def run_compare(arguments: list[str]) -> None:
    """Runs `compare` and prints its table.

    Args:
        arguments: What stands behind `compare`.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    from asyncdiff_pl.report.compare import compare

    parser = Parser(usage=f"{PROGRAM} compare A B [--SETTING VALUE ...]", description=DESCRIPTION)
    parser.add_function_arguments(compare, as_positional=True)
    print(compare(**parser.parse_args(arguments).as_dict()))
