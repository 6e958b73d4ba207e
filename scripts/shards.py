"""What scripts that measure in shards share: which part of the work is whose, rows that outlive a stop, the command."""

from __future__ import annotations

import csv
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import auto_cli

Key = TypeVar("Key")


def parse_shard(shard: str) -> tuple[int, int]:
    """Index and number of shards from `0/4`.

    Raises:
        ValueError: It does not read so.
    """
    parts = shard.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
        raise ValueError(f"shard is {shard}; give 0/4, 1/4, 2/4 or 3/4, say.")
    return int(parts[0]), int(parts[1])


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], append: bool = False) -> None:
    """Writes rows to a CSV file, with a header if it is new."""
    is_new = not append or not path.exists()
    with path.open("w" if is_new else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(columns)
        writer.writerows(rows)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, header first; one that was cut off is left out."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def complete_keys(found: Iterable[tuple[Key, int]], samples: int) -> set[Key]:
    """Keys of which all samples are there.

    Args:
        found: Keys with the number of a sample.
        samples: How many samples each should have.
    """
    there: dict[Key, set[int]] = {}
    for key, sample in found:
        there.setdefault(key, set()).add(sample)
    return {key for key, numbers in there.items() if numbers >= set(range(samples))}


def run_commands(*commands: Callable[..., None], description: str | None) -> None:
    """Runs one of the commands that the command line names; bad input is told in one line."""
    try:
        auto_cli(list(commands), description=description, formatter_class=RawDescriptionHelpFormatter)
    except ValueError as error:
        sys.exit(f"error: {error}")
