"""Where `validate` and `test` find what was trained: a checkpoint, a run's log folder, or an exported pipeline."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from asyncdiff_pl.callbacks.training_state import CHECKPOINT
from asyncdiff_pl.models.training.base import NetworkTraining

INDEX = "model_index.json"
"""What the folder of a pipeline holds."""


def find_checkpoint(given: str | None, loggers: list[Namespace]) -> Path:
    """The checkpoint that was asked for.

    Args:
        given: The file, or the log folder of a run, whose last state it is; None for the newest run of the config.
        loggers: Settings of the config's loggers.

    Raises:
        ValueError: There is none.
    """
    if given is None:
        return _newest(loggers) / CHECKPOINT
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"There is no {given}; give `--ckpt_path` the log folder of a run of `fit`, or a checkpoint.")
    if not (path / CHECKPOINT).is_file():
        raise ValueError(f"{given} holds no {CHECKPOINT}; give the log folder of a run of `fit`, or a checkpoint.")
    return path / CHECKPOINT


def find_pipeline(given: str | None) -> Path | None:
    """The exported pipeline that was asked for: its folder, or a log folder that has no more than that; else None."""
    if given is None:
        return None
    path = Path(given).expanduser()
    if (path / INDEX).is_file():
        return path
    exported = path / "export"
    return exported if (exported / INDEX).is_file() and not (path / CHECKPOINT).is_file() else None


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; its tensors are read when they are used.

    Raises:
        ValueError: It is no checkpoint of `fit`.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{file} is no checkpoint that can be read; give one that `fit` wrote.") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise ValueError(f"{file} is no checkpoint of a training run; give one that `fit` wrote.")
    return found


def export(file: Path, model: NetworkTraining) -> Path:
    """Writes the averaged weights of a checkpoint as a pipeline beside it, unless that is there.

    Any number of ranks may do so at once.

    Args:
        file: The checkpoint.
        model: The module that was trained; it gets the weights.

    Returns:
        The pipeline's folder.

    Raises:
        ValueError: The checkpoint is of another network.
    """
    found = read_checkpoint(file)
    target = file.with_name(f"{file.stem}-step={found['global_step']}")
    model.check_weights(found["state_dict"])
    if _is_newer(target / INDEX, file):
        return target
    # in training the average is put there; see callbacks/averaging.py
    model.load_state_dict(found["state_dict"])
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=file.parent))
    model.export(temporary)
    if not _is_newer(target / INDEX, file):
        shutil.rmtree(target, ignore_errors=True)
    try:
        temporary.rename(target)
    except OSError:
        # another rank was faster, with the same weights
        shutil.rmtree(temporary)
    return target


def _is_newer(index: Path, checkpoint: Path) -> bool:
    return index.is_file() and index.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def _newest(loggers: list[Namespace]) -> Path:
    """The newest log folder that a config's runs left a state in."""
    places = [Path(place.save_dir) / (place.name or "") for place in loggers]
    runs = [file.parents[1] for place in places for file in place.glob(f"version_*/{CHECKPOINT}")]
    if not runs:
        raise ValueError(
            f"There is no run with a state in {' or '.join(map(str, places)) or 'any log folder'}: train with `fit` "
            "first, or give `--ckpt_path` a log folder or a checkpoint."
        )
    return max(runs, key=lambda run: (run / CHECKPOINT).stat().st_mtime_ns)
