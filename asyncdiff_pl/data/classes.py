"""Class labels for models that draw a class, such as DiT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch.utils.data import Dataset
from typing_extensions import override

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.sample import Sample

Label = int | str


class ClassDataset(Dataset[Sample]):
    """Samples that have a class and nothing else.

    Args:
        entries: Id and label of each.
        caption: See `ClassLabels`.
    """

    def __init__(self, entries: Sequence[tuple[str, Label]], caption: str) -> None:
        self.entries = entries
        self.caption = caption

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        name, label = self.entries[index]
        # what a number means is the model's to know: nothing to score against
        captions = (self.caption.replace("{label}", label),) if isinstance(label, str) else ()
        return Sample(name, captions, inputs={"class_label": label})


class ClassLabels(SampleDataModule):
    """Classes to draw, by number or by name, each as often as asked for.

    The ids are the labels; several samples of a class are called `<label>-0`, `<label>-1`. A class that is given by its
    number has no caption: set `clip_score.model: null`.

    Args:
        labels: Numbers of classes, from 0, or their names as the checkpoint's `model_index.json` has them; `all` takes
            every class.
        samples_per_class: Number of samples of each class.
        batch_size: Number of samples that the pipeline gets in one call.
        num_classes: How many classes the model knows; DiT's were trained on ImageNet's 1000.
        caption: What a sample of a named class is scored against, with {label} for the name.
    """

    def __init__(
        self,
        labels: list[int | str] | Literal["all"],
        samples_per_class: int = 1,
        batch_size: int = 1,
        num_classes: int = 1000,
        caption: str = "a {label}",
    ) -> None:
        # there is nothing to read ahead
        super().__init__(batch_size)
        self.labels = labels
        self.samples_per_class = samples_per_class
        self.num_classes = num_classes
        self.caption = caption

    @override
    def samples(self) -> Dataset[Sample]:
        """The samples, class by class."""
        return ClassDataset(self._entries(), self.caption)

    @override
    def ids(self) -> Sequence[str]:
        """The samples' ids, class by class."""
        return [name for name, _ in self._entries()]

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the values in `Sample.inputs`."""
        return frozenset({"class_label"})

    @override
    def check(self) -> None:
        """Tells labels that there cannot be; whether the model knows a name is the model's to say.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        super().check()
        for name, value in (("samples_per_class", self.samples_per_class), ("num_classes", self.num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give a number from 1 up.")
        if self.labels == "all":
            return
        if isinstance(self.labels, str) or not self.labels:
            raise ValueError(f"labels is {self.labels!r}; give a list of classes, [207, 360] say, or all.")
        for label in self.labels:
            if isinstance(label, int) and not 0 <= label < self.num_classes:
                raise ValueError(
                    f"labels has {label}, but the classes are 0 to {self.num_classes - 1}; give one of them, or set "
                    "num_classes to what the model knows."
                )
        twice = [name for name, number in Counter(map(str, self.labels)).items() if number > 1]
        if twice:
            raise ValueError(
                f"labels has {', '.join(twice)} more than once; give each once, and set samples_per_class."
            )

    def _entries(self) -> list[tuple[str, Label]]:
        """Id and label of each sample."""
        self.check()
        labels: Sequence[Label] = range(self.num_classes) if self.labels == "all" else self.labels
        if self.samples_per_class == 1:
            return [(str(label), label) for label in labels]
        return [(f"{label}-{k}", label) for label in labels for k in range(self.samples_per_class)]
