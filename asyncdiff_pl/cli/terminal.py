"""What a run lets through to the terminal: its own words in one line each, and of the libraries what a user can use."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

# their log handlers, and Lightning's own way to write warnings, come with the import
import diffusers  # noqa: F401
import lightning.pytorch  # noqa: F401
import transformers  # noqa: F401

from asyncdiff_pl.processes import own_rank

PACKAGE = str(Path(__file__).parents[1])

USELESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*overridden `transfer_batch_to_device`.*",
    # scenes have no end, and those that come next follow from the number of steps
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)

USELESS_RECORDS = (
    "Tip:",
    "TPU available",
    "distributed_backend=",
    "`weights_only` was not set",
    "Detected KeyboardInterrupt",
    # pictures are read with PIL on purpose: torchvision is not needed
    "requires torchvision",
    # where the cache does not have the model either, a sentence says so
    "Couldn't connect to the Hub",
    # a model without such modules says so at each cast, AnimateDiff's when it is built
    "should be kept in float32: []",
    # JSON has no other keys than texts
    "Expected types for id2label",
)


def tidy() -> None:
    """Sets up warnings and logs of this process, before the package's own imports.

    On rank 0 all is shown that is of use, on the others what concerns them alone.
    """
    for pattern in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    warnings.showwarning = _show_warning
    own = logging.StreamHandler()
    own.setFormatter(logging.Formatter("asyncdiff_pl: %(message)s"))
    logging.getLogger("asyncdiff_pl").handlers = [own]
    # a logger's filters see only its own records, a handler's those of all loggers below it
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "diffusers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_useful)
    if own_rank() > 0:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
    # how the ranks find each other
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)


def _is_useful(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in USELESS_RECORDS)


def _show_warning(
    message: Warning | str, category: Any, filename: str, lineno: int, file: TextIO | None = None, line: Any = None
) -> None:
    # each data group reads files of its own; what else there is to warn of is the same on all ranks
    if own_rank() > 0 and not filename.startswith(f"{PACKAGE}/data/"):
        return
    if filename.startswith(PACKAGE):
        text = f"asyncdiff_pl: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
