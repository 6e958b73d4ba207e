"""The small models that ship with the package: each network stored once, pipelines put together in the user's cache.

A pipeline of the package is a recipe: the JSON files of a diffusers folder, and components.json, which says what fills
the other parts: a component (`svd-unet`), or a part of the CLIP model (`scene-clip/vision`, `/text`, `/tokenizer`). At
first use an ordinary pipeline folder is made of it, so that it is loaded as any other checkpoint is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file

from asyncdiff_pl.cache import CACHE_VARIABLE, cache_folder

MODELS_FOLDER = Path(__file__).parents[1] / "assets" / "models"
EMBEDDED = ("tiny-svd", "tiny-sd", "tiny-dit")
"""Pipelines that ship with the package, by the name that a user gives."""
EMBEDDED_CLIP = {"tiny-clip": "scene-clip"}
"""CLIP models that ship with the package: the name that a user gives, and the component."""

RECIPE = "components.json"
FILE_LIST = "files.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class Tower(NamedTuple):
    """One half of a CLIP model, as a model of its own."""

    config: str
    model_class: str
    prefixes: tuple[str, ...]


TOWERS = {
    "vision": Tower("vision_config", "CLIPVisionModelWithProjection", ("vision_model.", "visual_projection.")),
    "text": Tower("text_config", "CLIPTextModel", ("text_model.",)),
}


def find_component(name_or_folder: str) -> Path:
    """The folder of one network: a component of the package, or a local folder.

    Args:
        name_or_folder: `scene-clip`, `svd-unet`, ..., or a folder with a config.json.

    Returns:
        The folder; it holds config.json, and weight files if the network has been trained.

    Raises:
        ValueError: If there is neither such a component nor such a folder.
    """
    components = MODELS_FOLDER / "components"
    for folder in (components / name_or_folder, Path(name_or_folder).expanduser()):
        if (folder / "config.json").is_file():
            return folder
    names = ", ".join(sorted(path.parent.name for path in components.glob("*/config.json")))
    raise ValueError(f"{name_or_folder} is no folder with a config.json; give one, or one of {names}.")


def is_trained(name: str) -> bool:
    """Whether all networks of an embedded model have weights; otherwise all of them are random."""
    components = [EMBEDDED_CLIP[name]] if name in EMBEDDED_CLIP else _recipe(name).values()
    return all(any(find_component(entry.split("/")[0]).glob("*.safetensors")) for entry in components)


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model; a pipeline's is made in the cache if it is not there yet.

    Several processes may ask for it at once. It has no weight files unless all its networks have them.

    Args:
        name: One of `EMBEDDED` or `EMBEDDED_CLIP`.

    Returns:
        A folder that `from_pretrained` reads.

    Raises:
        ValueError: If the cache folder cannot be written.
    """
    if name in EMBEDDED_CLIP:
        return find_component(EMBEDDED_CLIP[name])
    try:
        target = cache_folder() / "models" / f"{name}-{_contents_hash(name)}"
        if not _is_complete(target):
            _put_together(name, target)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is put together in a cache folder, which failed ({error}); set {CACHE_VARIABLE} to a folder that "
            "can be written to."
        ) from error
    return target


# -- a pipeline folder ------------------------------------------------------------------------------------------------


def _recipe(name: str) -> dict[str, str]:
    return json.loads((MODELS_FOLDER / name / RECIPE).read_text(encoding="utf-8"))


def _put_together(name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        folder = Path(work) / "new"
        for source in _files(MODELS_FOLDER / name):
            if source.name != RECIPE:
                _copy(source, folder / source.relative_to(MODELS_FOLDER / name))
        with_weights = is_trained(name)
        for part, entry in _recipe(name).items():
            component, _, piece = entry.partition("/")
            _fill(folder / part, find_component(component), piece, with_weights)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
        (folder / FILE_LIST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
        try:
            if target.exists() and not _is_complete(target):
                target.rename(Path(work) / "damaged")
            folder.rename(target)
        except OSError:
            # another process has put it there
            if not _is_complete(target):
                raise


def _fill(folder: Path, component: Path, piece: str, with_weights: bool) -> None:
    if piece in TOWERS:
        _cut_out(TOWERS[piece], component, folder, with_weights)
        return
    for source in _files(component):
        is_weight = source.suffix == ".safetensors"
        wanted = source.name in TOKENIZER_FILES if piece == "tokenizer" else source.suffix == ".json" or is_weight
        if wanted and (with_weights or not is_weight):
            _copy(source, folder / source.name)


def _cut_out(tower: Tower, clip: Path, folder: Path, with_weights: bool) -> None:
    folder.mkdir(parents=True)
    whole = json.loads((clip / "config.json").read_text(encoding="utf-8"))
    own = {"architectures": [tower.model_class], "projection_dim": whole["projection_dim"]}
    config = json.dumps(whole[tower.config] | own, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    if with_weights:
        tensors = load_file(clip / "model.safetensors")
        kept = {key: value for key, value in tensors.items() if key.startswith(tower.prefixes)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _copy(source: Path, target: Path) -> None:
    # the content alone: an installed package may be read-only, and its folders' modes would be copied too
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


# -- is it there, and is it this one ----------------------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))
        return all((folder / path).stat().st_size == size for path, size in sizes.items())
    except (OSError, ValueError):
        return False


def _contents_hash(name: str) -> str:
    # this file too: it says how the parts are put together
    sources = [Path(__file__), *_files(MODELS_FOLDER / name)]
    for component in sorted({entry.split("/")[0] for entry in _recipe(name).values()}):
        sources += _files(find_component(component))
    parts = []
    for path in sources:
        status = path.stat()
        parts += [path.parent.name, path.name, _file_hash(path, status.st_size, status.st_mtime_ns)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
