"""Puts trained networks into the package: `embed_models.py svd-unet=lightning_logs/svd/version_0/export ...`.

Each folder is one as `ExportWeights` leaves it after `fit`. Weights are stored in float16; the CLIP model brings its
tokenizer and its processor. Nothing is changed unless all folders are sound and the package stays small enough.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from asyncdiff_pl.models import embedded
from asyncdiff_pl.models.embedded import TOKENIZER_FILES, find_component

LIMIT = 45_000_000
"""Bytes that all assets of the package may take."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="NAME=FOLDER", help="component of the package, and its export")
    pairs = [pair.partition("=") for pair in parser.parse_args(arguments).networks]
    try:
        embed({name: folder for name, _, folder in pairs})
    except ValueError as error:
        sys.exit(f"embed_models: error: {error}")


def embed(exports: dict[str, str]) -> None:
    """Replaces components of the package by what was exported, all of them or none.

    Args:
        exports: Folder of each component, by the component's name.

    Raises:
        ValueError: If a folder is not such a network, or if the package would become too large.
    """
    components = embedded.MODELS_FOLDER / "components"
    with tempfile.TemporaryDirectory(dir=components.parent, prefix=".") as work:
        for name, export in exports.items():
            target = find_component(name)
            if target.parent != components:
                raise ValueError(f"{name} is no component of the package; {components} has them.")
            prepare(name, Path(export), target, Path(work) / name)
        sizes = {path.name: size_of(path) for path in components.iterdir() if path.name not in exports}
        sizes |= {name: size_of(Path(work) / name) for name in exports}
        rest = size_of(embedded.MODELS_FOLDER.parent) - size_of(components) - size_of(Path(work))
        total = sum(sizes.values()) + rest
        for name, size in [*sorted(sizes.items()), ("all other assets", rest), ("in all", total)]:
            print(f"{name:26}{size / 1e6:8.2f} MB{'  new' if name in exports else ''}")
        if total > LIMIT:
            raise ValueError(f"The assets would take {total / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; train less.")
        for name in exports:
            shutil.rmtree(components / name)
            shutil.copytree(Path(work) / name, components / name)


def prepare(name: str, export: Path, current: Path, folder: Path) -> None:
    """Writes a component's new folder and checks that its network can be built of it, all weights used."""
    config, before = read_config(export), read_config(current)
    if class_name(config) != class_name(before):
        raise ValueError(f"{export} holds a {class_name(config)}, but {name} is a {class_name(before)}.")
    found = list(export.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{export} has {len(found)} files *.safetensors; it must have one.")
    folder.mkdir(parents=True)
    weights = {}
    for key, value in load_file(found[0]).items():
        weights[key] = value.half() if value.is_floating_point() else value
        if not weights[key].isfinite().all():
            raise ValueError(f"{key} of {export} has values that are too large for float16, or not numbers.")
    save_file(weights, folder / found[0].name, metadata={"format": "pt"})
    # where the network lay when it was trained is nobody's business
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    copied = [path for path in [current / "README.md"] if path.exists()]
    if config.get("model_type") == "clip":
        copied += [export / file for file in (*TOKENIZER_FILES, *PROCESSOR_FILES) if (export / file).exists()]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    check(name, export, folder, config)


def check(name: str, export: Path, folder: Path, config: dict[str, Any]) -> None:
    """Loads the network as a user would; a CLIP model also has to read and end a text."""
    library = diffusers if "_class_name" in config else transformers
    model, info = getattr(library, class_name(config)).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"The weights in {export} do not fit its config.json: {wrong}.")
    print(f"{name}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    if config.get("model_type") == "clip":
        tokenizer = transformers.CLIPProcessor.from_pretrained(folder).tokenizer
        text = model.config.text_config
        last = tokenizer("a small red star").input_ids[-1]
        if not last == tokenizer.eos_token_id == text.eos_token_id != 2 or len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"The tokenizer in {export} has {len(tokenizer)} tokens and ends a text with {last}, the model "
                f"{text.vocab_size} and {text.eos_token_id}; they must agree, and the end must not be 2."
            )


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable config.json; give NAME=FOLDER, a folder as `fit` exports it."
        ) from error


def class_name(config: dict[str, Any]) -> str:
    return config.get("_class_name") or config["architectures"][0]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
