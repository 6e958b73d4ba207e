"""What compares the pictures of two sets, as far as it is asked for and can be had: one pair of samples, or all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from asyncdiff_pl.callbacks.sample_table import Row, cell
from asyncdiff_pl.metrics import frechet
from asyncdiff_pl.metrics.frames import compare_frames
from asyncdiff_pl.metrics.lpips import LPIPS, SMALLEST, load_lpips
from asyncdiff_pl.metrics.networks import MissingNetwork
from asyncdiff_pl.metrics.paired import Mean
from asyncdiff_pl.metrics.precision_recall import PrecisionRecall
from asyncdiff_pl.metrics.ssim import WINDOW
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.clip import check_clip, is_random, load_clip
from asyncdiff_pl.models.features import load_features, load_network
from asyncdiff_pl.report.picture_sets import Key, PictureSet

TIMES = {"seconds": "seconds a sample", "step_latency_ms": "ms a step"}
"""Columns of samples.csv that count for timed samples only."""


@dataclass
class Tools:
    """What compares pictures, as far as it was asked for and can be had.

    Args:
        device: Where networks compute.
        lpips: The network of LPIPS.
        features: Name and network of the Fréchet distance.
        neighbours: Name and network of precision and recall.
        clip: Name and network of the score.
        notes: What is missing, and why.
    """

    device: str
    lpips: LPIPS | None = None
    features: tuple[str, torch.nn.Module] | None = None
    neighbours: tuple[str, torch.nn.Module] | None = None
    clip: tuple[str, TextImageScore] | None = None
    notes: list[str] = field(default_factory=list)


def load_tools(lpips: str | None, features: str | None, neighbours: str | None, clip: str | None, device: str) -> Tools:
    """Loads what was asked for; what cannot be had is left out, with a word in the notes.

    Args:
        lpips: Source of LPIPS' weights; see `metrics.lpips.load_lpips`.
        features: Network of the Fréchet distance; see `models.features.load_network`.
        neighbours: Network of precision and recall, of the same kinds.
        clip: CLIP model that scores.
        device: Where they compute.

    Raises:
        ValueError: There is no such device, file or model.
    """
    try:
        is_there = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        is_there = False
    if not is_there:
        raise ValueError(
            f"device is {device}, which torch does not find here; give cpu, or cuda on a machine with GPUs."
        )
    tools = Tools(device)
    if clip is not None:
        check_clip(clip)
        name = f"CLIP score ({clip}{', random weights' if is_random(clip) else ''})"
        tools.clip = (name, TextImageScore(*load_clip(clip, device)))
    try:
        tools.lpips = None if lpips is None else load_lpips(lpips).to(device)
    except MissingNetwork as error:
        tools.notes.append(f"no LPIPS: {error}")
    try:
        if features is not None:
            name, network = load_features(features)
            frechet.FrechetDistance(network)
            tools.features = (name, network.to(device))
    except MissingNetwork as error:
        tools.notes.append(f"no Fréchet distance: {error}")
    try:
        if neighbours is not None:
            name, network = load_network(neighbours)
            tools.neighbours = (name, network.to(device))
    except MissingNetwork as error:
        tools.notes.append(f"no precision and recall: {error}")
    return tools


def measure_pair(first: PictureSet, second: PictureSet, keys: tuple[Key, Key], tools: Tools) -> Row:
    """All numbers of one pair, as a row of compare_samples.csv; times and scores alone where frames are missing."""
    (n, name), (m, _) = keys
    row = {"steps": steps_text(n, m), "id": name}
    rows = [part.rows.get(key, {}) for part, key in zip((first, second), keys, strict=True)]
    for which, own in zip("ab", rows, strict=True):
        for column in TIMES:
            row[f"{column}_{which}"] = own.get(column, "") if own.get("timed") == "True" else ""
    frames = [part.frames(key) if key in part.files else [] for part, key in zip((first, second), keys, strict=True)]
    if tools.clip is not None:
        texts = first.captions.get(name) or second.captions.get(keys[1][1])
        scores = [cell(tools.clip[1](part, texts).item()) if texts else "" for part in frames]
        scorers = [tools.clip[0]] * 2
    else:
        scores, scorers = ([own.get(column, "") for own in rows] for column in ("score", "scorer"))
    row |= {"score_a": scores[0], "score_b": scores[1], "scorer_a": scorers[0], "scorer_b": scorers[1]}
    if len(frames[0]) != len(frames[1]) or not frames[0]:
        return row
    smallest = min(frames[0][0].size)
    network = tools.lpips if smallest >= SMALLEST else None
    try:
        found = compare_frames(frames[1], frames[0], smallest >= WINDOW, network, tools.device)
    except ValueError as error:
        raise ValueError(f"Sample {name} of {second.label} does not compare with {first.label}: {error}") from error
    return row | {column: cell(value) for column, value in found.items()}


def set_distance(
    first: PictureSet, second: PictureSet, steps: tuple[int | None, int | None], tools: Tools
) -> Mean | None:
    """The Fréchet distance between all pictures of two sets."""
    assert tools.features is not None
    name, network = tools.features
    distance = frechet.FrechetDistance(network).to(tools.device)
    for part, n, is_real in ((first, steps[0], True), (second, steps[1], False)):
        for key in part.files:
            if key[0] == n:
                distance.add(part.frames(key), is_real)
    counts = distance.counts
    if min(counts) < 2:
        tools.notes.append(
            f"no {name}: it needs 2 pictures or more on each side, and there are {counts[0]}, {counts[1]}"
        )
        return None
    if min(counts) <= distance.num_features:
        tools.notes.append(
            f"{name} is of {counts[0]} and {counts[1]} pictures, and the network has {distance.num_features} features: "
            "it is too large, and compares only with distances of equally many pictures"
        )
    return Mean(distance.compute(), math.nan)


def set_agreement(
    first: PictureSet, second: PictureSet, steps: tuple[int | None, int | None], tools: Tools
) -> dict[str, Mean]:
    """Precision and recall of the second set's pictures, with the first's as the real ones; none of too few."""
    assert tools.neighbours is not None
    name, network = tools.neighbours
    measure = PrecisionRecall(network)
    for part, n, is_real in ((first, steps[0], True), (second, steps[1], False)):
        for key in part.files:
            if key[0] == n:
                measure.add(part.frames(key), is_real)
    if min(measure.counts) < measure.least:
        tools.notes.append(
            f"no precision and recall: they need {measure.least} pictures or more on each side, and there are "
            f"{measure.counts[0]}, {measure.counts[1]}"
        )
        return {}
    return {f"{what} ({name})": Mean(value, math.nan) for what, value in measure.compute()._asdict().items()}


def steps_text(n: int | None, m: int | None) -> str:
    """Step counts of A and B in words; nothing for plain folders."""
    counts = list(dict.fromkeys(str(steps) for steps in (n, m) if steps is not None))
    return f"{' and '.join(counts)} steps" if counts else ""
