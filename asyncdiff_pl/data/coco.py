"""Images with captions in COCO's format, brought to the size of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from typing_extensions import override

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.pictures import Fit, check_fit, read_picture
from asyncdiff_pl.data.sample import Sample

DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo_coco"
"""Sixteen drawn scenes with their captions: what the name `demo` stands for."""


@dataclass(frozen=True)
class CocoEntry:
    """One image of an annotation file.

    Args:
        id: Its id.
        path: Its file; None where captions are served alone.
        captions: All its captions.
        prompt: The caption that the model is told; None takes the first.
        seed: Seed of its noise; None takes the run's seed and the id.
    """

    id: str
    path: Path | None
    captions: tuple[str, ...]
    prompt: str | None = None
    seed: int | None = None


class CocoDataset(Dataset[Sample]):
    """Reads images when they are asked for.

    Args:
        entries: The images.
        width: Width of the samples' images, in pixels; None where there are none.
        height: Height of the samples' images, in pixels; None where there are none.
        fit: How an image of another shape is brought to that size; see `fit_image`.
    """

    def __init__(self, entries: Sequence[CocoEntry], width: int | None, height: int | None, fit: Fit) -> None:
        self.entries = entries
        self.width = width
        self.height = height
        self.fit = fit

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        image = None if entry.path is None else read_picture(entry.path, self.width, self.height, self.fit)
        return Sample(entry.id, entry.captions, image, prompt=entry.prompt, seed=entry.seed)


class CocoCaptions(SampleDataModule):
    """Images of a folder, in the order of their ids, each with all its captions of a COCO annotation file.

    Images that the file names and the folder lacks are left out, and their number is said.

    Args:
        images_dir: Folder of the images, such as COCO's `val2017`; `demo` means sixteen drawn scenes that come with the
            package (write `./demo` for a folder of that name); null serves the captions of all images without the
            images, as prompts.
        annotations: Captions file in COCO's format, such as `captions_val2017.json`; `demo` means the captions of the
            drawn scenes.
        max_images: Takes the first so many images; null takes all.
        height: Height that the images are brought to, in pixels; a multiple of 8. Captions alone need none.
        width: Width that the images are brought to, in pixels; a multiple of 8. Captions alone need none.
        fit: How an image of another shape is brought to that size: `crop` cuts off what juts out, equally on both
            sides; `pad` adds black bars; `stretch` distorts it.
        batch_size: Number of images that the pipeline gets in one call.
        num_workers: Number of processes that read images ahead; 0 reads them in the main process.
        skip_uncaptioned: Leaves out images without a caption; otherwise they are an error.
        caption_index: Which of an image's captions is the prompt, from 0; null takes the first; `in_turn` takes caption
            i mod n of image number i, which has n captions, counted from 0. What is generated is scored against all
            captions of the image.
        number_as_seed: Whether image number i of the run, from 0, has noise of the seed i, as in the tables of
            DistriFusion and PCPP, whatever the model's seed is.
    """

    def __init__(
        self,
        images_dir: str | None,
        annotations: str,
        max_images: int | None = None,
        height: int = 576,
        width: int = 1024,
        fit: Fit = "crop",
        batch_size: int = 1,
        num_workers: int = 0,
        skip_uncaptioned: bool = False,
        caption_index: int | Literal["in_turn"] | None = None,
        number_as_seed: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.images_dir = None if images_dir is None else _folder(images_dir)
        self.annotations = DEMO_FOLDER / "captions.json" if annotations == "demo" else Path(annotations).expanduser()
        self.max_images = max_images
        # without pictures the model alone says what the size is
        self.height = None if images_dir is None else height
        self.width = None if images_dir is None else width
        self.fit = fit
        self.skip_uncaptioned = skip_uncaptioned
        self.caption_index = caption_index
        self.number_as_seed = number_as_seed
        self._entries: list[CocoEntry] | None = None

    @override
    def samples(self) -> Dataset[Sample]:
        """The images, brought to the size of the run, with their captions."""
        return CocoDataset(self.entries, self.width, self.height, self.fit)

    @override
    def ids(self) -> Sequence[str]:
        """The images' ids, in the order of the annotation file's numbers."""
        return [entry.id for entry in self.entries]

    @property
    def entries(self) -> Sequence[CocoEntry]:
        """The images of the run; no image is read for them."""
        self.check()
        assert self._entries is not None
        return self._entries

    @override
    def check(self) -> None:
        """Reads the annotation file and looks for the images, once; a second call does nothing.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        if self._entries is not None:
            return
        super().check()
        check_fit(self.fit, self.height, self.width)
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images is {self.max_images}; give a number from 1 up, or null for all images.")
        if isinstance(self.caption_index, int) and self.caption_index < 0:
            raise ValueError(
                f"caption_index is {self.caption_index}; give a number from 0 up, in_turn, or null for the first."
            )
        if self.images_dir is not None and not self.images_dir.is_dir():
            raise ValueError(f"images_dir {self.images_dir} is not a folder; give the folder that holds the images.")
        self._entries = self._choose(read_captions(self.annotations))

    def _choose(self, coco: COCO) -> list[CocoEntry]:
        """The images of the run: those in the folder, in order of id, with captions, `max_images` at most."""
        images = [coco.imgs[key] for key in sorted(coco.imgs)]
        folder = self.images_dir
        present = [image for image in images if folder is None or (folder / image["file_name"]).is_file()]
        if not present:
            raise ValueError(
                f"None of the {len(images)} images that {self.annotations} names is in images_dir {self.images_dir} "
                f"({images[0]['file_name']} for one); give the folder and the captions of the same images."
            )
        entries = [
            CocoEntry(
                str(image["id"]),
                None if folder is None else folder / image["file_name"],
                tuple(note["caption"] for note in coco.imgToAnns.get(image["id"], ()) if note["caption"].strip()),
            )
            for image in present
        ]
        num_left_out = 0
        if self.skip_uncaptioned:
            captioned = [entry for entry in entries if entry.captions]
            num_left_out, entries = len(entries) - len(captioned), captioned
        entries = entries[: self.max_images]
        uncaptioned = [entry.id for entry in entries if not entry.captions]
        if uncaptioned:
            some = ", ".join(uncaptioned[:5]) + (", ..." if len(uncaptioned) > 5 else "")
            raise ValueError(
                f"{len(uncaptioned)} of the {len(entries)} images of the run have no caption in {self.annotations} "
                f"(ids {some}); give them captions, or set skip_uncaptioned: true to leave them out."
            )
        if not entries:
            raise ValueError(
                f"None of the {len(present)} images{'' if folder is None else f' in {folder}'} has a caption in "
                f"{self.annotations}; give the captions of these images."
            )
        if len(present) < len(images):
            missing = len(images) - len(present)
            first = f"; max_images takes the first {len(entries)}" if len(entries) == self.max_images else ""
            rank_zero_info(
                f"using {len(present)} of {len(images)} annotated images: {missing} are not in {self.images_dir}{first}"
            )
        if num_left_out:
            rank_zero_info(f"leaving out {num_left_out} images without a caption in {self.annotations}")
        if self.number_as_seed:
            entries = [dataclasses.replace(entry, seed=number) for number, entry in enumerate(entries)]
        return self._with_prompts(entries)

    def _with_prompts(self, entries: list[CocoEntry]) -> list[CocoEntry]:
        """The same images, each told by the caption that `caption_index` names."""
        index = self.caption_index
        if index is None:
            return entries
        if index == "in_turn":
            own = (entry.captions[number % len(entry.captions)] for number, entry in enumerate(entries))
            return [dataclasses.replace(entry, prompt=prompt) for entry, prompt in zip(entries, own, strict=True)]
        short = [entry for entry in entries if len(entry.captions) <= index]
        if short:
            least = min(len(entry.captions) for entry in short)
            some = ", ".join(entry.id for entry in short[:5]) + (", ..." if len(short) > 5 else "")
            raise ValueError(
                f"caption_index is {index}, counted from 0, but {len(short)} of the {len(entries)} images of the run "
                f"have fewer than {index + 1} captions in {self.annotations} (ids {some}); give at most {least - 1}."
            )
        return [dataclasses.replace(entry, prompt=entry.captions[index]) for entry in entries]


def _folder(images_dir: str) -> Path:
    return DEMO_FOLDER / "images" if images_dir == "demo" else Path(images_dir).expanduser()


def read_captions(path: Path) -> COCO:
    """Reads a captions file in COCO's format.

    Args:
        path: The file, such as `captions_val2017.json`.

    Returns:
        pycocotools' index of it.

    Raises:
        ValueError: The file is missing, is no JSON, or its JSON is of another format.
    """
    remedy = "give a captions file in COCO's format, such as captions_val2017.json."
    if not path.is_file():
        raise ValueError(f"annotations {path} is not a file; {remedy}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"annotations {path} is not JSON ({error}); {remedy}") from error
    fault = _fault(content)
    if fault:
        raise ValueError(f"annotations {path} has another format ({fault}); {remedy}")
    coco = COCO()
    # an empty list of categories, which some converters write, would make pycocotools look for each caption's category
    coco.dataset = {key: value for key, value in content.items() if key != "categories"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _fault(content: Any) -> str | None:
    """In what the content of a JSON file differs from COCO's captions format."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not an object with `images` and `annotations`"
    fields = {"images": {"id": int, "file_name": str}, "annotations": {"image_id": int, "id": int, "caption": str}}
    for name, kinds in fields.items():
        rows = content.get(name)
        if not isinstance(rows, list) or not rows:
            return f"it has no `{name}`, or none in a list"
        for field, kind in kinds.items():
            num_bad = sum(not isinstance(row, dict) or not isinstance(row.get(field), kind) for row in rows)
            if num_bad:
                return f"{num_bad} of its {len(rows)} {name} have no `{field}` of type {kind.__name__}"
    num_twice = len(content["images"]) - len({image["id"] for image in content["images"]})
    return f"{num_twice} of its images have the id of another" if num_twice else None
