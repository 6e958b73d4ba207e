"""Sheets that show how a solver comes to a picture: rows are iterations, columns are states from noise to result."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from asyncdiff_pl.models.decoding import to_pictures
from asyncdiff_pl.report.sheet import draw_sheet
from asyncdiff_pl.sampling import Iteration

MAX_ROWS = 6
MAX_COLUMNS = 5

PICTURE_DIMS = 4
"""Dimensions of a picture's states, [N + 1, C, H, W]; a video's have one more."""


@dataclass(frozen=True)
class Snapshot:
    """Some states of a sample after an iteration.

    Args:
        iteration: Number of the iteration, from 1.
        unfinished: States that had not converged.
        numbers: Numbers of the states.
        states: The states, [columns, ...].
    """

    iteration: int
    unfinished: int
    numbers: list[int]
    states: Tensor


def take(iteration: Iteration, sample: int, pipeline: Any) -> Snapshot:
    """Copies some states of a sample, from the noisiest to the result; of a video the frame in the middle.

    Args:
        iteration: What a solver tells.
        sample: Index of the sample in the batch.
        pipeline: Its autoencoder tells in which dimension frames are.
    """
    states = iteration.trajectories[sample]
    numbers = _spread(len(states), MAX_COLUMNS)[::-1]
    if states.ndim > PICTURE_DIMS:
        # where frames are decoded together they come before the channels (SVD), else behind them (AnimateDiff)
        dim = 1 if _decodes_frames(pipeline) else 2
        states = states.select(dim, states.shape[dim] // 2)
    return Snapshot(iteration.number, iteration.finished[sample], numbers, states[numbers].float())


def draw(snapshots: Sequence[Snapshot], scales: Sequence[float], pipeline: Any) -> Image.Image:
    """Draws a sheet; with shared decoding all ranks of the pipeline must call it.

    Args:
        snapshots: Those of all iterations that a sample took part in.
        scales: What states are multiplied with to be the pipeline's latents.
        pipeline: Its autoencoder decodes.
    """
    # an iteration after the sample's last one shows nothing new
    last = next((at for at, snapshot in enumerate(snapshots) if not snapshot.unfinished), len(snapshots) - 1)
    shown = [snapshots[at] for at in _spread(last + 1, MAX_ROWS)]
    rows = []
    for snapshot in shown:
        scale = torch.tensor([scales[number] for number in snapshot.numbers], device=snapshot.states.device)
        rows.append([[picture] for picture in _decode(pipeline, snapshot.states * scale.view(-1, 1, 1, 1))])
    titles = [f"state {number}" for number in shown[0].numbers]
    texts = [f"iteration {snapshot.iteration}: {snapshot.unfinished} states left" for snapshot in shown]
    return draw_sheet(rows, titles, texts)


def _spread(number: int, most: int) -> list[int]:
    """Some of 0 … number - 1, the first and the last among them."""
    count = min(number, most)
    return [round(at * (number - 1) / max(1, count - 1)) for at in range(count)] if count > 1 else [number - 1]


def _decodes_frames(pipeline: Any) -> bool:
    """Whether the autoencoder decodes the frames of a video together."""
    return "num_frames" in inspect.signature(pipeline.vae.decode).parameters


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    vae = pipeline.vae
    # autoencoders that overflow in 16 bits say so
    dtype = torch.float32 if getattr(vae.config, "force_upcast", False) else vae.dtype
    own = vae.dtype
    vae.to(dtype)
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    one_each = {"num_frames": 1} if _decodes_frames(pipeline) else {}
    frames = vae.decode(scaled.to(dtype), return_dict=False, **one_each)[0]
    vae.to(own)
    return to_pictures((frames.float() / 2 + 0.5).clamp(0, 1))
