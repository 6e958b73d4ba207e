"""Reads files of prompts as rows: text, CSV, TSV and JSONL files, and folders of pictures with captions beside them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncdiff_pl.data.pictures import SUFFIXES

OTHER_NAMES = {"text": "prompt", "file_name": "image"}
"""Columns as Hugging Face's image folders call them, and what they are called here."""

TEXT_COLUMNS = frozenset({"id", "caption"})
"""Columns of a table whose cells are text whatever they look like; so is each that has `prompt` in its name."""

_FORMATS = "a .txt file (a prompt a line), a .csv, .tsv or .jsonl file"


@dataclass(frozen=True)
class Row:
    """What a file says of one prompt.

    Args:
        place: Where it stands, for messages: `line 3`, say.
        name: The id that it has if it names none.
        values: What it says, by column; columns that it leaves empty are not there.
    """

    place: str
    name: str
    values: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Reads a file of prompts, or a folder of pictures with their captions.

    Args:
        path: A `.txt`, `.csv`, `.tsv` or `.jsonl` file; or a folder with `metadata.jsonl` or `metadata.csv`, or whose
            pictures have text files of the same name beside them.

    Returns:
        The rows in the file's order; a folder's pictures without a table come in order of their names.

    Raises:
        ValueError: In one sentence, with file, line and remedy.
    """
    table = _table_of(path) if path.is_dir() else path
    if table is None:
        rows = list(_captioned_pictures(path))
    elif not table.is_file():
        raise ValueError(f"path {table} is neither a file nor a folder; give {_FORMATS}, or a folder of pictures.")
    else:
        readers = {".txt": _lines, ".csv": _cells, ".tsv": _cells, ".jsonl": _objects}
        reader = readers.get(table.suffix.lower())
        if reader is None:
            raise ValueError(f"path {table} ends with {table.suffix or 'no suffix'}; give {_FORMATS}.")
        rows = list(reader(table))
    if not rows:
        raise ValueError(f"{path} holds no prompts; write one, or give another file.")
    return rows


def _lines(path: Path) -> Iterator[Row]:
    """A prompt a line; empty lines and lines that begin with # say nothing."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield Row(f"line {number}", str(number), {"prompt": prompt})


def _objects(path: Path) -> Iterator[Row]:
    """An object a line."""
    example = 'give an object a line, such as {"prompt": "a red ball"}.'
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); {example}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}, line {number} holds a {type(content).__name__}; {example}")
        _check_names(f"{path}, line {number}", names := [OTHER_NAMES.get(name, name) for name in content])
        values = {name: value for name, value in zip(names, content.values(), strict=True) if value is not None}
        yield Row(f"line {number}", str(number), values)


def _cells(path: Path) -> Iterator[Row]:
    """A header and a row each, as spreadsheets write them; cells that are JSON are read as such."""
    text = _text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {number} is no row of a table ({error}); put texts that hold quotes or line breaks in "
                "double quotes, and double the quotes within."
            ) from error
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header = [OTHER_NAMES.get(name, name) for name in cells]
            _check_names(str(path), header)
            if not {"prompt", "image", "class_label"} & set(header):
                raise ValueError(
                    f"{path} has no column `prompt` (its columns: {', '.join(header)}); name the column of the prompts "
                    "so in the first line."
                )
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number} has {len(cells)} cells and the header {len(header)}; put texts that hold "
                "commas or quotes in double quotes."
            )
        read = {name: _value(name, cell) for name, cell in zip(header, cells, strict=True) if cell}
        yield Row(f"line {number}", str(number), {name: value for name, value in read.items() if value is not None})


def _check_names(place: str, names: list[str]) -> None:
    """Tells columns that are there twice, or that are called by no name."""
    twice = sorted({name or "without a name" for name in names if not name or names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{place} has columns that cannot be told apart ({', '.join(twice)}); name each once, with `text` the same "
            "as `prompt` and `file_name` as `image`."
        )


def _value(name: str, cell: str) -> Any:
    if name in TEXT_COLUMNS or "prompt" in name:
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _table_of(folder: Path) -> Path | None:
    """The table of a folder of pictures, if it has one."""
    tables = (folder / "metadata.jsonl", folder / "metadata.csv")
    return next((table for table in tables if table.is_file()), None)


def _captioned_pictures(folder: Path) -> Iterator[Row]:
    """Pictures with text files beside them, each line of which is a caption and the first the prompt as well."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    bare = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare or not pictures:
        raise ValueError(
            f"{len(bare)} of the {len(pictures)} pictures in the folder {folder} have no text file beside them"
            f"{f' ({bare[0]} for one)' if bare else ''}; write NAME.txt for each NAME.png, or a metadata.jsonl with "
            "`file_name` and `text`."
        )
    for path in pictures:
        captions = [line.strip() for line in _text(path.with_suffix(".txt")).split("\n") if line.strip()]
        said = {"prompt": captions[0], "caption": captions} if captions else {}
        yield Row(path.name, path.stem, {"image": path.name, **said})


def _text(path: Path) -> str:
    # lines end at line feeds alone: `splitlines` would cut JSON and prompts at rarer characters as well
    try:
        # a byte order mark, which spreadsheets write, is no part of the first column's name
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it in UTF-8.") from error
