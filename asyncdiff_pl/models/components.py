"""Parts of a pipeline that come from elsewhere: ControlNets, a motion adapter, another autoencoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from torch import nn

from asyncdiff_pl.models.embedded import MODELS_FOLDER
from asyncdiff_pl.models.loading import WeightsSource, check_not_quantised, init_parameters
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import build_random_model, component_class
from asyncdiff_pl.models.sources import (
    ARCHITECTURES,
    find_folder,
    first_reason,
    has_weights,
    read_json,
    why_unreachable,
)

Places = Mapping[str, str | Sequence[str] | None]
"""For each part where it comes from: one place, or several for parts that may be several; None leaves it out."""


def check_components(pipeline_class: type[DiffusionPipeline] | None, places: Places, weights: WeightsSource) -> None:
    """Checks what can be known of parts from elsewhere without loading or fetching anything.

    Args:
        pipeline_class: The pipeline they are for; None if it is not known yet.
        places: Where they come from.
        weights: `pretrained` or `random`.

    Raises:
        ValueError: In one sentence.
    """
    if pipeline_class is not None:
        takes = init_parameters(pipeline_class)
        for name in places:
            if name not in takes:
                raise ValueError(
                    f"components.{name} is set, but {pipeline_class.__name__} has no {name}: it has "
                    f"{', '.join(takes)}; set `pipeline` to a class that has one."
                )
    for name, place in places.items():
        for entry in _several(place):
            folder = _find(name, entry)
            if folder is None:
                if weights == "random" and entry not in ARCHITECTURES:
                    raise ValueError(
                        f"`weights: random` does not know the architecture of components.{name} {entry}; give a local "
                        "folder with its config.json."
                    )
                continue
            config = read_json(folder, "config.json", f"a {name}")
            check_not_quantised(entry, {name: config})
            if weights == "pretrained" and not has_weights(folder):
                raise ValueError(f"components.{name} {entry} has no weight files; add them or set `weights: random`.")


def load_components(
    places: Places, weights: WeightsSource, dtype: torch.dtype, variant: str | None = None
) -> dict[str, Any]:
    """Loads or builds parts from elsewhere, on the CPU.

    Args:
        places: Where they come from; `check_components` has passed.
        weights: `pretrained` or `random`.
        dtype: Number format of the weights.
        variant: Variant of the weight files; parts that do not have it are loaded from their plain files.

    Returns:
        What `from_pretrained` takes: a part, a list of parts, or None, by name.

    Raises:
        ValueError: A part cannot be fetched or read.
    """
    loaded: dict[str, Any] = {}
    for name, place in places.items():
        parts = [_load(name, entry, weights, dtype, variant, number) for number, entry in enumerate(_several(place))]
        loaded[name] = None if place is None else parts[0] if isinstance(place, str) else parts
        if name == "text_encoder" or name.startswith("text_encoder_"):
            # a tokenizer without its encoder would be asked for embeddings all the same
            loaded |= {name.replace("text_encoder", "tokenizer"): None} if place is None else {}
    return loaded


def read_part_config(name: str, entry: str) -> dict[str, Any] | None:
    """The configuration of a part from elsewhere, as far as it is known without fetching anything.

    Args:
        name: The part.
        entry: Where it comes from; `check_components` has passed.
    """
    folder = _find(name, entry)
    if folder is not None:
        return read_json(folder, "config.json", f"a {name}")
    known, overrides = ARCHITECTURES.get(entry, (None, {}))
    if known is None:
        return None
    return read_json(MODELS_FOLDER / known, "config.json", f"a {name}") | overrides.get(name, {})


def _load(
    name: str, entry: str, weights: WeightsSource, dtype: torch.dtype, variant: str | None, number: int
) -> nn.Module:
    folder = _find(name, entry)
    if weights == "random":
        changes: Mapping[str, Any] = {}
        if folder is None:
            known, overrides = ARCHITECTURES[entry]
            folder, changes = MODELS_FOLDER / known, overrides.get(name, {})
        kind = _class_of(read_json(folder, "config.json", f"a {name}"), name, entry)
        # two parts of one kind must not have the same weights
        return build_random_model(kind, folder, dtype, changes, seed_name=f"{name}.{number}" if number else name)
    # one question to the hub: each file would be asked for again and again
    unreachable = why_unreachable(entry) if folder is None else None
    offline = unreachable is not None
    with _one_sentence(name, entry, unreachable), quiet_libraries():
        if folder is None:
            file = hf_hub_download(entry, "config.json", local_files_only=offline)
        else:
            file = folder / "config.json"
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        check_not_quantised(entry, {name: config})
        kind = _class_of(config, name, entry)
        try:
            part = kind.from_pretrained(folder or entry, variant=variant, dtype=dtype, local_files_only=offline)
        except OSError:
            if variant is None:
                raise
            part = kind.from_pretrained(folder or entry, dtype=dtype, local_files_only=offline)
    assert isinstance(part, nn.Module)
    return part.eval()


def _class_of(config: Mapping[str, Any], name: str, entry: str) -> type[Any]:
    """The class that a part's config.json names."""
    for library, class_name in (("diffusers", config.get("_class_name")), *_transformers(config)):
        if class_name is None:
            continue
        try:
            kind = component_class(library, class_name)
        except AttributeError:
            continue
        if library != "diffusers" or issubclass(kind, ModelMixin):
            return kind
    raise ValueError(f"components.{name} {entry} names no known class in its config.json; give a {name} of diffusers.")


def _transformers(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("transformers", kind) for kind in config.get("architectures") or []]


def _several(place: str | Sequence[str] | None) -> list[str]:
    return [] if place is None else [place] if isinstance(place, str) else list(place)


def _find(name: str, entry: str) -> Path | None:
    try:
        return find_folder(entry, embedded=())
    except ValueError as error:
        raise ValueError(
            f"components.{name} is {entry}, which is no folder; give an existing one or a hub name (owner/name)."
        ) from error


@contextmanager
def _one_sentence(name: str, entry: str, unreachable: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPError) as error:
        reason = unreachable or first_reason(error)
        raise ValueError(
            f"components.{name} {entry} could not be loaded ({reason}); give a folder that is complete, or a hub name "
            "that can be reached."
        ) from error
