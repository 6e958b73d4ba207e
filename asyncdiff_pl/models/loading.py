"""Pipelines from a checkpoint: with its weights, or with random ones."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HTTPError
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from asyncdiff_pl.models.embedded import EMBEDDED, MODELS_FOLDER, is_trained
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.random_weights import build_random_pipeline
from asyncdiff_pl.models.sources import (
    ARCHITECTURES,
    WEIGHT_SUFFIXES,
    find_folder,
    first_reason,
    has_weights,
    read_index,
    read_json,
)

WeightsSource = Literal["pretrained", "random"]
"""`pretrained` loads a checkpoint's weights, `random` builds its network without them."""


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    pretrained: str,
    weights: WeightsSource,
    dtype: torch.dtype,
    variant: str | None = None,
    components: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Loads or builds a pipeline on the CPU.

    Args:
        pipeline_class: Which pipeline; `DiffusionPipeline` lets the checkpoint say.
        pretrained: A hub name, a local folder, or the name of an embedded model.
        weights: `pretrained` or `random`; an embedded model that is not trained is random either way, with a warning.
        dtype: Number format of the weights.
        variant: Variant of the weight files, `fp16` say; null takes the plain files.
        components: Parts that are loaded already, by name; None for one that the pipeline does without.

    Returns:
        The pipeline, all its parts in `dtype`.

    Raises:
        ValueError: If the checkpoint cannot be found, fetched or read, or its architecture is not known.
    """
    parts = dict(components or {})
    check_pretrained(pipeline_class, pretrained, weights, parts)
    folder = find_folder(pretrained)
    if _lacks_safety_checker(pretrained, describe_weights(pretrained, weights)):
        # with random weights it would black out pictures at random
        parts = {"safety_checker": None, "requires_safety_checker": False} | parts
    if describe_weights(pretrained, weights) == "random":
        if weights == "pretrained":
            rank_zero_warn(f"{pretrained}: random weights, its pictures mean nothing")
        overrides: Mapping[str, Mapping[str, Any]] = {}
        if folder is None:
            name, overrides = ARCHITECTURES[pretrained]
            folder = MODELS_FOLDER / name
        with quiet_libraries():
            return build_random_pipeline(pipeline_class, folder, dtype, overrides, parts)
    with quiet_libraries(only_if=rank_zero_only.rank > 0), _one_sentence(pretrained, variant):
        pipeline = _or_from_cache(
            pipeline_class.from_pretrained, folder or pretrained, dtype=dtype, variant=variant, **parts
        )
    models = {name: part for name, part in pipeline.components.items() if hasattr(part, "config")}
    check_not_quantised(pretrained, {name: _plain_config(part.config) for name, part in models.items()})
    return pipeline


def prepare_download(
    pipeline_class: type[DiffusionPipeline],
    pretrained: str,
    weights: WeightsSource,
    variant: str | None = None,
    components: Collection[str] = (),
) -> None:
    """Fetches a hub checkpoint into the cache, if the run needs it; to be called on one rank of each node.

    Args:
        pipeline_class: Which pipeline.
        pretrained: A hub name; for folders and embedded models nothing is done.
        weights: For `random` nothing is done.
        variant: Variant of the weight files.
        components: Names of parts that come from elsewhere.

    Raises:
        ValueError: If the checkpoint is not in the cache and cannot be fetched, or has no such variant.
    """
    check_pretrained(pipeline_class, pretrained, weights, components)
    if weights == "pretrained" and find_folder(pretrained) is None:
        with _one_sentence(pretrained, variant):
            _or_from_cache(pipeline_class.download, pretrained, variant=variant, **dict.fromkeys(components))


def check_pretrained(
    pipeline_class: type[DiffusionPipeline],
    pretrained: str,
    weights: WeightsSource,
    components: Collection[str] = (),
) -> None:
    """Checks what can be known of a checkpoint without loading or fetching anything.

    Args:
        pipeline_class: The pipeline that will be built from it.
        pretrained: A hub name, a local folder, or the name of an embedded model.
        weights: `pretrained` or `random`.
        components: Names of parts that come from elsewhere.

    Raises:
        ValueError: If the folder is missing, is no pipeline, is another pipeline than asked for, has no weights or
            quantised ones, or if the architecture of a hub checkpoint is not known and `weights` is `random`.
    """
    folder = find_folder(pretrained)
    if folder is None:
        if weights == "random" and pretrained not in ARCHITECTURES:
            raise ValueError(
                f"`weights: random` knows the architectures of {', '.join(ARCHITECTURES)} and {', '.join(EMBEDDED)}, "
                f"not that of {pretrained}; give a local folder with the checkpoint's JSON files."
            )
        return
    index = read_json(folder, "model_index.json", "a diffusers pipeline's folder")
    missing = sorted(_required_components(pipeline_class) - index.keys() - set(components))
    if missing:
        raise ValueError(
            f"The folder {pretrained} holds a {index.get('_class_name')}, which lacks {', '.join(missing)} to be a "
            f"{pipeline_class.__name__}; give another folder, or what is missing as `components`."
        )
    configs = {path.parent.name: read_json(path.parent, path.name, "readable") for path in folder.glob("*/config.json")}
    check_not_quantised(pretrained, configs)
    if weights == "pretrained" and pretrained not in EMBEDDED and not has_weights(folder):
        raise ValueError(
            f"The folder {pretrained} has no weight files (*{', *'.join(WEIGHT_SUFFIXES)}); add them or set "
            "`weights: random`."
        )


def describe_weights(pretrained: str, weights: WeightsSource) -> Literal["pretrained", "random"]:
    """What weights a run really has: `random` also for an embedded model that is not trained."""
    if weights == "pretrained" and pretrained in EMBEDDED and not is_trained(pretrained):
        return "random"
    return weights


def check_not_quantised(pretrained: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Tells quantised weights.

    Their layers keep their weights in formats of their own, which can neither be cast to the run's number format nor
    be read on the meta device, where a cut is found.

    Args:
        pretrained: What the user gave.
        configs: The parts' config.json by name.

    Raises:
        ValueError: A part is quantised.
    """
    for name, config in configs.items():
        quantisation = config.get("quantization_config")
        if quantisation:
            method = dict(quantisation).get("quant_method", "an unknown method")
            raise ValueError(
                f"The {name} of {pretrained} is quantised ({getattr(method, 'value', method)}), which cannot be cut "
                "into stages; give the checkpoint in float16 or bfloat16."
            )


def find_pipeline(name: str) -> type[DiffusionPipeline]:
    """Finds a pipeline's class.

    Args:
        name: A class name of diffusers, or a class with its module (`my_package.MyPipeline`).

    Returns:
        The class.

    Raises:
        ValueError: If there is no such pipeline.
    """
    module, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "diffusers"), class_name)
        assert issubclass(found, DiffusionPipeline)
    except (ImportError, AttributeError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        near = difflib.get_close_matches(name, [n for n in dir(diffusers) if n.endswith("Pipeline")], 3)
        examples = near or ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"]
        raise ValueError(
            f"There is no pipeline {name}; take {', '.join(examples)}, another pipeline of diffusers, or a class with "
            "its module (my_package.MyPipeline)."
        ) from error
    return found


def init_parameters(pipeline_class: type[DiffusionPipeline]) -> list[str]:
    """Names of what a pipeline is made of."""
    return [name for name in inspect.signature(pipeline_class.__init__).parameters if name not in ("self", "kwargs")]


def _or_from_cache(fetch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return fetch(*args, **kwargs)
    except OSError:
        raise
    except HTTPError:
        # diffusers 0.42 turns to the cache if the network is down, but not if a firewall lets it time out
        return fetch(*args, local_files_only=True, **kwargs)


@contextmanager
def _one_sentence(pretrained: str, variant: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if variant is not None and f"variant={variant}" in str(error):
            raise ValueError(
                f"{pretrained} has no weight files of variant {variant}; set `variant: null` for the plain files."
            ) from error
        reason = first_reason(error)
        if find_folder(pretrained) is None:
            known = ", or set `weights: random`" if pretrained in ARCHITECTURES else ""
            raise ValueError(
                f"{pretrained} is not in the cache and could not be fetched from the hub ({reason}); give a local "
                f"folder as `pretrained`{known}."
            ) from error
        raise ValueError(
            f"The folder {pretrained} could not be loaded with variant {variant} ({reason}); complete it, or set "
            "another `variant`."
        ) from error


def _required_components(pipeline_class: type[DiffusionPipeline]) -> set[str]:
    parameters = inspect.signature(pipeline_class).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name for p in named if p.default is p.empty} - set(pipeline_class._optional_components)


def _lacks_safety_checker(pretrained: str, weights: WeightsSource) -> bool:
    """Whether a checkpoint names a safety checker that there is none of."""
    index = read_index(pretrained)
    if index is None or (index.get("safety_checker") or [None])[0] is None:
        return False
    folder = find_folder(pretrained)
    return weights == "random" or (folder is not None and not (folder / "safety_checker").is_dir())


def _plain_config(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
