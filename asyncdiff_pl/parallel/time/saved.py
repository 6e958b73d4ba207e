"""Files of trajectories: all states of a sample between noise and result, to look at or to begin another one with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch

FOLDER = "trajectories"
"""Where a run's trajectories are within its log folder."""

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SavedTrajectory:
    """The states of one sample.

    Args:
        states: [N + 1, ...], in the scale in which a denoiser is given states; state 0 is the result, state N the
            noise.
        timesteps: Timesteps of the N steps, in the scheduler's order.
        scheduler: Class of the scheduler.
    """

    states: torch.Tensor
    timesteps: list[float]
    scheduler: str

    def encode(self) -> bytes:
        """The content of a file."""
        metadata = {
            "steps": str(len(self.timesteps)),
            "scheduler": self.scheduler,
            "timesteps": json.dumps(self.timesteps),
        }
        return safetensors.torch.save({"states": self.states.cpu().contiguous()}, metadata)


def trajectory_path(folder: Path, steps: int, sample_id: str) -> Path:
    """Where a sample's trajectory is in a log folder.

    Args:
        folder: Log folder of the run.
        steps: Denoising steps of the sample.
        sample_id: Its id.
    """
    return folder / FOLDER / f"steps={steps}" / f"{quote(sample_id, safe=' ')}{SUFFIX}"


def find_trajectory(place: Path, steps: int, sample_id: str) -> Path:
    """The file to begin a sample with.

    Args:
        place: The file, for all samples; or a run's log folder, or `trajectories` within it, for the same sample's.
        steps: Denoising steps of the sample.
        sample_id: Its id.

    Raises:
        ValueError: There is none.
    """
    if place.is_file():
        return place
    path = trajectory_path(place.parent if place.name == FOLDER else place, steps, sample_id)
    if path.is_file():
        return path
    raise ValueError(
        f"initial_trajectory is {place}, which holds no {path.relative_to(place.parent)}: give the log folder of a run "
        "with `--trajectories.save true`, over the same samples in as many steps, or a file of it for all samples."
    )


def read_trajectory(path: Path) -> SavedTrajectory:
    """Reads a file.

    Args:
        path: The file.

    Raises:
        ValueError: It is none of these files.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return SavedTrajectory(
                file.get_tensor("states"), json.loads(metadata["timesteps"]), metadata.get("scheduler", "")
            )
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no trajectory of a run with `--trajectories.save true` ({error}); give one of those files."
        ) from error
