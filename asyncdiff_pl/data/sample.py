"""What one run of a pipeline starts from, and how a run over several step counts is a longer list of the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch.utils.data import Dataset


@dataclass
class Sample:
    """One thing to generate.

    Args:
        id: Name of the sample, unique in its dataset; it names rows, files and the noise.
        captions: What the picture shows, for scores; the first is the prompt where none is given.
        image: Conditioning picture, already in the size of the run; None where the model takes none.
        steps: Number of denoising steps; None takes the module's.
        inputs: Further values by name, for this sample alone: arguments of the pipeline's call (`negative_prompt`,
            `guidance_scale`) and what the module fills in by name (`mask_image`, `control_image`, `class_label`).
        prompt: What the model is told to draw; None takes the first caption.
        seed: Seed of this sample's noise; None makes one from the run's seed and the id.
    """

    id: str
    captions: tuple[str, ...] = ()
    image: Image.Image | None = None
    steps: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    seed: int | None = None

    def to(self, *args: Any, **kwargs: Any) -> Sample:
        """Stays where it is: Lightning would move it to the device, but the pipeline moves what it computes with."""
        return self

    @property
    def key(self) -> tuple[int | None, str]:
        """What tells this piece of work from every other of the run: step count and id."""
        return self.steps, self.id

    @property
    def text(self) -> str:
        """What the model is told to draw: the prompt, else the first caption, else nothing."""
        if self.prompt is not None:
            return self.prompt
        return self.captions[0] if self.captions else ""


class UnreadableSample(Exception):
    """Raised by a dataset for a sample that cannot be read: the run reports it, counts it and goes on without it.

    Args:
        source: The file that cannot be read.
        reason: What is wrong with it.
    """

    def __init__(self, source: str, reason: str) -> None:
        # both go to the base class: that is what travels from a data worker to the main process
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.source} cannot be read: {self.reason}"


class StepSweep(Dataset[Sample]):
    """The samples once for each step count, step count by step count, less those that are done.

    Args:
        samples: The samples; each element is read when it is asked for.
        ids: The samples' ids, in order, so that what is done is known without reading it.
        steps: Numbers of denoising steps.
        done: Keys `(steps, id)` that are left out.
    """

    def __init__(
        self,
        samples: Dataset[Sample],
        ids: Sequence[str],
        steps: Sequence[int | None],
        done: Collection[tuple[int | None, str]] = (),
    ) -> None:
        self.samples = samples
        done = set(done)
        self.entries = [(n, index) for n in steps for index, name in enumerate(ids) if (n, name) not in done]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        steps, sample = self.entries[index]
        return dataclasses.replace(self.samples[sample], steps=steps)
