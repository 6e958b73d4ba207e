"""Prompts and pictures for scripts/benchmark.py: made up, since latency does not depend on what they show."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from asyncdiff_pl.models.loading import find_pipeline, init_parameters
from asyncdiff_pl.models.sources import read_index

PICTURES = ("image", "mask_image", "control_image")
"""Pictures that pipelines are called with, by the columns of a prompt file; adapters are not part of a benchmark."""

PROMPT = "a black dog runs over a red bridge in the snow"


def made_up_data(settings: dict[str, Any], samples: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Settings of data of the same kind and size as a config's own, without any file of the user's.

    Args:
        settings: The config.
        samples: Number of samples.
        overrides: Further arguments of the command, which may name another checkpoint.
        folder: Where the prompts and pictures are written.

    Raises:
        ValueError: What the pipeline is called with is not known.
    """
    data, model = settings["data"]["init_args"], settings["model"]["init_args"]
    if settings["data"]["class_path"].endswith("ClassLabels"):
        return settings["data"] | {"init_args": {"labels": list(range(samples))}}
    size = {name: data.get(name) or model.get(name) for name in ("height", "width")}
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name in _pictures(settings["model"], overrides):
        picture = Image.new("RGB", (size["width"], size["height"]), "black")
        corner = (size["width"] // 2, size["height"] // 2)
        ImageDraw.Draw(picture).rectangle(((0, 0), corner), fill="white")
        picture.save(folder / f"{name}.png")
        pictures[name] = f"{name}.png"
    rows = [json.dumps({"id": str(number), "prompt": PROMPT, **pictures}) for number in range(samples)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    path = {"path": str((folder / "prompts.jsonl").resolve())}
    return {"class_path": "asyncdiff_pl.data.PromptFile", "init_args": path | (size if pictures else {})}


def _pictures(model: dict[str, Any], overrides: list[str]) -> list[str]:
    """Which pictures a model's pipeline is called with."""
    if model["class_path"] == "asyncdiff_pl.models.VideoPredictor":
        return ["image"]
    if model["class_path"] != "asyncdiff_pl.models.PipelinePredictor":
        raise ValueError(f"What {model['class_path']} takes is not known; give a config of PipelinePredictor.")
    arguments = model["init_args"]
    pipeline = arguments.get("pipeline")
    if pipeline is None:
        pretrained = _override(overrides, "--model.pretrained") or arguments["pretrained"]
        index = read_index(pretrained)
        if index is None:
            raise ValueError(f"The architecture of {pretrained} is not known; give a folder as --model.pretrained.")
        pipeline = index["_class_name"]
    kind = find_pipeline(pipeline)
    pictures = [name for name in PICTURES if name in inspect.signature(kind.__call__).parameters]
    if "controlnet" in init_parameters(kind) and "control_image" not in pictures:
        # these call by `image` what ControlNet looks at
        pictures[pictures.index("image")] = "control_image"
    return pictures


def _override(overrides: list[str], name: str) -> str | None:
    for at, argument in enumerate(overrides):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name:
            return overrides[at + 1]
    return None
