"""LoRA and IP-Adapters: small networks that change a pipeline, loaded before anything is installed on its denoiser."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError

from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.sources import first_reason, why_unreachable


@dataclass
class Lora:
    """A LoRA: low-rank changes of a pipeline's weights.

    Args:
        path: A `.safetensors` file, its folder, or a hub name.
        weight: Weight of the change; 1 as it was trained, 0 for none.
        weight_name: File in the folder or on the hub; null where `path` is a file, or a folder with one such file.
    """

    path: str
    weight: float = 1.0
    weight_name: str | None = None


@dataclass
class IPAdapter:
    """An IP-Adapter: lets a pipeline be told by a picture beside its prompt.

    Args:
        path: A folder, or a hub name.
        subfolder: Folder below it that holds the file; `.` for `path` itself.
        weight_name: The adapter's file.
        scale: Weight of the picture; 1 the most, 0 for none.
        image_encoder: Folder of the image encoder, below `subfolder`, or below `path` if it holds a `/`; null where
            the pipeline has one of its own.
    """

    path: str
    subfolder: str
    weight_name: str
    scale: float = 1.0
    image_encoder: str | None = "image_encoder"


def check_adapters(
    pipeline_class: type[DiffusionPipeline] | None, loras: Sequence[Lora], ip_adapter: IPAdapter | None
) -> None:
    """Tells early what is wrong with adapters, without loading or fetching anything.

    Args:
        pipeline_class: The pipeline they are for; None if it is not known yet.
        loras: LoRAs.
        ip_adapter: An IP-Adapter, if any.

    Raises:
        ValueError: In one sentence.
    """
    for wanted, method in ((loras, "load_lora_weights"), (ip_adapter, "load_ip_adapter")):
        if wanted and pipeline_class is not None and not hasattr(pipeline_class, method):
            name = "lora" if wanted is loras else "ip_adapter"
            raise ValueError(f"{pipeline_class.__name__} takes no {name}; leave it out, or take another pipeline.")
    if loras and importlib.util.find_spec("peft") is None:
        raise ValueError("A LoRA needs the package peft; install it: pip install 'asyncdiff_pl[adapters]'.")
    for lora in loras:
        place = Path(lora.path).expanduser()
        if place.is_file():
            continue
        if place.is_dir():
            _lora_file(place, lora.weight_name)
        elif _is_hub_name(lora.path, "lora") and lora.weight_name is None:
            raise ValueError(f"The LoRA {lora.path} is on the hub; name its file as `weight_name`.")
    if ip_adapter is not None:
        place = Path(ip_adapter.path).expanduser()
        file = place / ip_adapter.subfolder / ip_adapter.weight_name
        if place.is_dir() and not file.is_file():
            raise ValueError(f"The IP-Adapter has no file {file}; set subfolder and weight_name to where it is.")
        if not place.is_dir():
            _is_hub_name(ip_adapter.path, "ip_adapter")


def prepare_adapters(loras: Sequence[Lora], ip_adapter: IPAdapter | None) -> None:
    """Fetches adapters' files from the hub into the cache; to be called on one rank of each node.

    The image encoder of an IP-Adapter is fetched when it is loaded.

    Raises:
        ValueError: A file cannot be fetched.
    """
    for lora in loras:
        if not Path(lora.path).expanduser().exists():
            _fetch(lora.path, lora.weight_name, None)
    if ip_adapter is not None and not Path(ip_adapter.path).expanduser().exists():
        _fetch(ip_adapter.path, ip_adapter.weight_name, ip_adapter.subfolder)


def load_adapters(pipeline: DiffusionPipeline, loras: Sequence[Lora], ip_adapter: IPAdapter | None) -> None:
    """Puts adapters on a pipeline.

    LoRAs are merged into the weights, so that they cost nothing in a step and every stage has its share of them.

    Args:
        pipeline: Changed in place.
        loras: LoRAs; several add up.
        ip_adapter: An IP-Adapter, if any.

    Raises:
        ValueError: A file cannot be read, or does not fit the pipeline.
    """
    for number, lora in enumerate(loras):
        place, name = Path(lora.path).expanduser(), lora.weight_name
        if place.is_file():
            file = place
        else:
            file = _lora_file(place, name) if place.is_dir() else _fetch(lora.path, name, None)
        with _one_sentence(f"The LoRA {lora.path}"), quiet_libraries():
            pipeline.load_lora_weights(str(file), adapter_name=f"lora_{number}")
    if loras:
        names = [f"lora_{number}" for number in range(len(loras))]
        known = {name for part in pipeline.get_list_adapters().values() for name in part}
        for name, lora in zip(names, loras, strict=True):
            if name not in known:
                raise ValueError(
                    f"The LoRA {lora.path} changes nothing of {type(pipeline).__name__}: it was made for a network of "
                    "another kind; take one for this one."
                )
        pipeline.set_adapters(names, [lora.weight for lora in loras])
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()
    if ip_adapter is not None:
        place = Path(ip_adapter.path).expanduser()
        with _one_sentence(f"The IP-Adapter {ip_adapter.path}"), quiet_libraries():
            pipeline.load_ip_adapter(
                str(place) if place.is_dir() else ip_adapter.path,
                subfolder=ip_adapter.subfolder,
                weight_name=ip_adapter.weight_name,
                image_encoder_folder=ip_adapter.image_encoder,
                local_files_only=not place.is_dir() and why_unreachable(ip_adapter.path) is not None,
            )
        pipeline.set_ip_adapter_scale(ip_adapter.scale)


def _fetch(name: str, file: str | None, subfolder: str | None) -> Path:
    """A file of the hub, in the cache."""
    assert file is not None
    # one question to the hub: each file would be asked for again and again
    unreachable = why_unreachable(name)
    with _one_sentence(f"{file} of {name}", unreachable):
        return Path(hf_hub_download(name, file, subfolder=subfolder, local_files_only=unreachable is not None))


def _lora_file(folder: Path, name: str | None) -> Path:
    if name is not None:
        if not (folder / name).is_file():
            raise ValueError(f"The LoRA has no file {folder / name}; set weight_name to one that is there.")
        return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if len(files) != 1:
        raise ValueError(
            f"The LoRA folder {folder} has {len(files)} .safetensors files; give one of them as `path` or weight_name."
        )
    return files[0]


def _is_hub_name(path: str, what: str) -> bool:
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith(".safetensors"):
        raise ValueError(f"{what} names {path}, which is not there; give a file, a folder, or a hub name (owner/name).")
    return True


@contextmanager
def _one_sentence(what: str, unreachable: str | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, HTTPError) as error:
        reason = first_reason(error).rstrip(":") if unreachable is None else f"the hub says: {unreachable}"
        raise ValueError(
            f"{what} could not be loaded ({reason}); give one that is there and fits the model."
        ) from error
