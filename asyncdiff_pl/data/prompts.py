"""Prompts of a file, each with settings of its own: how often, from which noise, with which pictures and arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.pictures import Fit, check_fit, read_picture
from asyncdiff_pl.data.prompt_tables import Row, read_rows
from asyncdiff_pl.data.sample import Sample

DEMO_FILE = Path(__file__).parents[1] / "assets" / "demo_prompts.txt"
"""Captions of eight drawn scenes that no network was trained on: what the name `demo` stands for."""

PICTURES = ("image", "mask_image", "control_image", "ip_adapter_image")
"""Columns that name picture files."""

LISTS = ("control_image", "ip_adapter_image")
"""Those of them that may name several, one for each ControlNet or adapter."""

NUMBERS = ("strength", "eta", "guidance_rescale", "noise_level", "height", "width", "num_frames")
"""Arguments of pipelines that are numbers; so is each whose name ends with `_scale`, and it may be a list of them."""

STEPS = ("steps", "num_inference_steps", "timesteps", "sigmas")
"""Arguments that every sample of a run has in common."""


@dataclass(frozen=True)
class PromptEntry:
    """One picture or video to generate, before any file is read for it.

    Args:
        id: Name of the sample.
        prompt: What the model is told; None where it is told a picture or a class alone.
        captions: What the result is scored against.
        seed: Seed of its noise; None takes the run's seed and the id.
        pictures: Picture files by column; a list where the column names a list.
        inputs: Further arguments of the pipeline's call.
    """

    id: str
    prompt: str | None
    captions: tuple[str, ...]
    seed: int | None
    pictures: dict[str, Path | list[Path]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


class PromptDataset(Dataset[Sample]):
    """Reads the prompts' pictures when they are asked for.

    Args:
        entries: The prompts.
        width: Width that pictures are brought to, in pixels; None leaves them as they are.
        height: Height that pictures are brought to, in pixels; None leaves them as they are.
        fit: How a picture of another shape is brought to that size; see `pictures.fit_image`.
    """

    def __init__(self, entries: Sequence[PromptEntry], width: int | None, height: int | None, fit: Fit) -> None:
        self.entries = entries
        self.width = width
        self.height = height
        self.fit = fit

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        inputs = {**entry.inputs}
        for column, paths in entry.pictures.items():
            several = isinstance(paths, list)
            pictures = [self._read(column, path) for path in (paths if several else [paths])]
            inputs[column] = pictures if several else pictures[0]
        image = inputs.pop("image", None)
        return Sample(entry.id, entry.captions, image, None, inputs, entry.prompt, entry.seed)

    def _read(self, column: str, path: Path) -> Any:
        if column == "ip_adapter_image":
            # it goes to an image encoder, whose own processor brings it to the encoder's size
            return read_picture(path)
        return read_picture(path, self.width, self.height, self.fit, is_mask=column == "mask_image")


class PromptFile(SampleDataModule):
    """Prompts of a text, CSV or JSONL file, each with settings of its own if need be, or a folder's captioned pictures.

    Columns of a CSV file, and names of a JSONL file's objects: `prompt` (or `text`); `id` (the line's number where it
    is missing); `caption`, what the result is scored against (the prompt where it is missing; JSONL may list several);
    `negative_prompt`; `seed`, of the noise; `images`, how many are generated; the picture files `image` (or
    `file_name`), `mask_image`, `control_image` and `ip_adapter_image`, relative to the file's folder (the last two also
    as lists); `class_label`; and any other argument of the pipeline's call, such as `guidance_scale` or `strength`.
    Several images of one prompt have the ids `<id>-0`, `<id>-1` and the seeds seed, seed + 1.

    Args:
        path: The file: `.txt` with a prompt a line (empty lines, and lines that begin with #, are skipped), `.csv`,
            `.tsv` or `.jsonl`. Or a folder of pictures with `metadata.jsonl`, or with NAME.txt beside each NAME.png.
            Tables have a column `prompt`, and `id`, `caption`, `negative_prompt`, `seed`, `images` (how many), `image`,
            `mask_image`, `control_image`, `ip_adapter_image` (files), or any argument of the pipeline's call. `demo`
            means eight prompts that come with the package (write `./demo` for a file of that name).
        max_prompts: Takes the first so many prompts; null takes all.
        images_per_prompt: Number of pictures or videos of each prompt that does not say `images` itself.
        height: Height that pictures of the file are brought to, in pixels, a multiple of 8; null leaves them as they
            are. How large the results are is a setting of the model.
        width: Width that pictures of the file are brought to, in pixels, a multiple of 8; null leaves them as they are.
        fit: How a picture of another shape is brought to that size: `crop` cuts off what juts out, equally on both
            sides; `pad` adds black bars; `stretch` distorts it. Masks stay without grey; `ip_adapter_image` stays as
            it is.
        batch_size: Number of samples that the pipeline gets in one call.
        num_workers: Number of processes that read pictures ahead; 0 reads them in the main process.
    """

    def __init__(
        self,
        path: str,
        max_prompts: int | None = None,
        images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        fit: Fit = "crop",
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.path = DEMO_FILE if path == "demo" else Path(path).expanduser()
        self.max_prompts = max_prompts
        self.images_per_prompt = images_per_prompt
        self.height = height
        self.width = width
        self.fit = fit
        self._entries: list[PromptEntry] | None = None

    @override
    def samples(self) -> Dataset[Sample]:
        """The prompts, with their pictures and settings."""
        return PromptDataset(self.entries, self.width, self.height, self.fit)

    @override
    def ids(self) -> Sequence[str]:
        """The samples' ids, in the file's order."""
        return [entry.id for entry in self.entries]

    @property
    def entries(self) -> Sequence[PromptEntry]:
        """What is to be generated; no picture is read for it."""
        self.check()
        assert self._entries is not None
        return self._entries

    @property
    def input_names(self) -> frozenset[str]:
        """Names of all values that `Sample.inputs` of any sample will have: known without reading a picture."""
        return frozenset(name for entry in self.entries for name in (*entry.inputs, *entry.pictures) if name != "image")

    @override
    def check(self) -> None:
        """Reads the file and looks for the pictures, once; a second call does nothing.

        Raises:
            ValueError: In one sentence, with file, line and remedy.
        """
        if self._entries is not None:
            return
        super().check()
        check_fit(self.fit, self.height, self.width)
        for name, value, otherwise in (
            ("max_prompts", self.max_prompts, ", or null for all prompts"),
            ("images_per_prompt", self.images_per_prompt, ""),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give a number from 1 up{otherwise}.")
        rows = read_rows(self.path)[: self.max_prompts]
        entries = [(row, entry) for row in rows for entry in self._entries_of(row)]
        self._check_ids(entries)
        self._check_pictures(entries)
        self._entries = [entry for _, entry in entries]

    def _entries_of(self, row: Row) -> Iterator[PromptEntry]:
        """The samples of one row."""
        where = f"{self.path}, {row.place}"
        values = {**row.values}
        name = str(values.pop("id", "")) or row.name
        prompt = _text(where, "prompt", values.pop("prompt", None))
        _text(where, "negative_prompt", values.get("negative_prompt"))
        captions = _texts(where, "caption", values.pop("caption", prompt or ()))
        seed = _whole_number(where, "seed", values.pop("seed", None), 0)
        number = _whole_number(where, "images", values.pop("images", None), 1) or self.images_per_prompt
        folder = self.path if self.path.is_dir() else self.path.parent
        pictures = {key: _paths(where, key, values.pop(key), folder) for key in PICTURES if key in values}
        if prompt is None and "image" not in pictures and "class_label" not in values:
            raise ValueError(f"{where} has no prompt; give it one, an `image` or a `class_label`.")
        _check_arguments(where, values)
        for k in range(number):
            yield PromptEntry(
                name if number == 1 else f"{name}-{k}",
                prompt,
                captions,
                None if seed is None else seed + k,
                pictures,
                values,
            )

    def _check_ids(self, entries: list[tuple[Row, PromptEntry]]) -> None:
        first: dict[str, Row] = {}
        for row, entry in entries:
            if entry.id in first:
                raise ValueError(
                    f"{self.path} has the id {entry.id} twice, in {first[entry.id].place} and {row.place}; give each "
                    "prompt an id of its own, or none."
                )
            first[entry.id] = row

    def _check_pictures(self, entries: list[tuple[Row, PromptEntry]]) -> None:
        """Tells missing pictures before the run: a name that is wrong is not a broken file."""
        named: dict[Path, str] = {}
        for row, entry in entries:
            for paths in entry.pictures.values():
                for path in paths if isinstance(paths, list) else [paths]:
                    named.setdefault(path, row.place)
        missing = [(place, path) for path, place in named.items() if not path.is_file()]
        if missing:
            place, path = missing[0]
            raise ValueError(
                f"{len(missing)} of the {len(named)} pictures that {self.path} names are missing ({path}, in {place}, "
                "for one); give their paths relative to the file's folder."
            )


def _text(where: str, name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} in {where} is {value!r}; give a text.")
    return value


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} in {where} is {value!r}; give a text or a list of texts.")
    return tuple(text for text in texts if text.strip())


def _whole_number(where: str, name: str, value: Any, least: int) -> int | None:
    # 2.0 is what a spreadsheet makes of a column with empty cells
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name} in {where} is {value!r}; give a whole number from {least} up.")
    return value


def _paths(where: str, name: str, value: Any, folder: Path) -> Path | list[Path]:
    if isinstance(value, str):
        return folder / Path(value).expanduser()
    is_list = isinstance(value, list) and value and all(isinstance(path, str) for path in value)
    if is_list and name in LISTS:
        return [folder / Path(path).expanduser() for path in value]
    several = " or a list of such" if name in LISTS else ""
    raise ValueError(f"{name} in {where} is {value!r}; give the path of a picture{several}.")


def _check_arguments(where: str, values: dict[str, Any]) -> None:
    """Tells values that no pipeline takes."""
    for name, value in values.items():
        if name in STEPS:
            raise ValueError(
                f"{where} sets {name}, which all samples of a run have in common; leave it out and set "
                "model.num_inference_steps."
            )
        numbers = value if isinstance(value, list) else [value]
        if (name in NUMBERS or name.endswith("_scale")) and not all(_is_number(number) for number in numbers):
            raise ValueError(f"{name} in {where} is {value!r}; give a number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
