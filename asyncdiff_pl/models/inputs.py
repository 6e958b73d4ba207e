"""What a loaded pipeline makes of prompts and of class labels, told before it is called."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from asyncdiff_pl.data.sample import Sample


def tell_cut_prompts(pipeline: DiffusionPipeline, samples: Sequence[Sample]) -> None:
    """Warns of prompts of which the text encoders see only the beginning.

    Args:
        pipeline: The pipeline, with its tokenizers.
        samples: What it is about to be called with.
    """
    parts = pipeline.components.items()
    tokenizers = [part for name, part in parts if name.startswith("tokenizer") and part is not None]
    if not tokenizers:
        return
    tokenizer = max(tokenizers, key=lambda part: part.model_max_length)
    for sample in samples:
        length = len(tokenizer(sample.text, verbose=False).input_ids)
        if length > tokenizer.model_max_length:
            rank_zero_warn(
                f"The prompt of sample {sample.id} has {length} tokens, of which the model sees the first "
                f"{tokenizer.model_max_length}."
            )


def class_number(pipeline: DiffusionPipeline, classes: int | None, pretrained: str, label: int | str) -> int:
    """The number of a class.

    Args:
        pipeline: The pipeline, whose `labels` name classes if it has any.
        classes: How many there are; None if that is not known.
        pretrained: What the user gave, for reports.
        label: A number or a name.

    Raises:
        ValueError: There is no such class.
    """
    if isinstance(label, int) or label.isdecimal():
        number = int(label)
        if classes is not None and not 0 <= number < classes:
            raise ValueError(f"{pretrained} has no class {label}; give a number from 0 to {classes - 1}.")
        return number
    labels = getattr(pipeline, "labels", {})
    if label not in labels:
        known = f"one of its {len(labels)} names, {', '.join(list(labels)[:3])} say, or " if labels else ""
        raise ValueError(f"{pretrained} knows no class {label}; give {known}a number.")
    return labels[label]
