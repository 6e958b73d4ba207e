"""Images with captions in COCO's format, brought to the size of the run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from typing_extensions import override

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.sample import Sample, UnreadableSample

DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo_coco"
"""Sixteen drawn scenes with their captions: what the name `demo` stands for."""

Fit = Literal["crop", "pad", "stretch"]


def fit_image(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """Brings an image to a size, with Lanczos resampling.

    Args:
        image: RGB image.
        width: Width of the result, in pixels.
        height: Height of the result, in pixels.
        fit: `crop` scales until the image covers the size and cuts off what juts out, equally on both sides; `pad`
            scales until it fits in and adds black bars, equally on both sides; `stretch` scales width and height
            apart.
    """
    size = (width, height)
    if fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="black")
    return image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class CocoEntry:
    """One image of an annotation file: its id, its file and all its captions."""

    id: str
    path: Path
    captions: tuple[str, ...]


class CocoDataset(Dataset[Sample]):
    """Reads images when they are asked for.

    Args:
        entries: The images.
        width: Width of the samples' images, in pixels.
        height: Height of the samples' images, in pixels.
        fit: How an image of another shape is brought to that size; see `fit_image`.
    """

    def __init__(self, entries: Sequence[CocoEntry], width: int, height: int, fit: Fit) -> None:
        self.entries = entries
        self.width = width
        self.height = height
        self.fit = fit

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        try:
            with Image.open(entry.path) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
            image = fit_image(upright, self.width, self.height, self.fit)
        # whatever a broken file makes a decoder raise: Pillow's span OSError, SyntaxError, ValueError, struct.error ...
        except Exception as error:
            raise UnreadableSample(str(entry.path), str(error) or type(error).__name__) from error
        return Sample(entry.id, entry.captions, image)


class CocoCaptions(SampleDataModule):
    """Images of a folder, in the order of their ids, each with all its captions of a COCO annotation file.

    Images that the file names and the folder lacks are left out, and their number is said.

    Args:
        images_dir: Folder of the images, such as COCO's `val2017`; `demo` means sixteen drawn scenes that come with the
            package (write `./demo` for a folder of that name).
        annotations: Captions file in COCO's format, such as `captions_val2017.json`; `demo` means the captions of the
            drawn scenes.
        max_images: Takes the first so many images; null takes all.
        height: Height that the images are brought to, in pixels; a multiple of 8.
        width: Width that the images are brought to, in pixels; a multiple of 8.
        fit: How an image of another shape is brought to that size: `crop` cuts off what juts out, equally on both
            sides; `pad` adds black bars; `stretch` distorts it.
        batch_size: Number of images that the pipeline gets in one call.
        num_workers: Number of processes that read images ahead; 0 reads them in the main process.
        skip_uncaptioned: Leaves out images without a caption; otherwise they are an error.
    """

    def __init__(
        self,
        images_dir: str,
        annotations: str,
        max_images: int | None = None,
        height: int = 576,
        width: int = 1024,
        fit: Fit = "crop",
        batch_size: int = 1,
        num_workers: int = 0,
        skip_uncaptioned: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.images_dir = DEMO_FOLDER / "images" if images_dir == "demo" else Path(images_dir).expanduser()
        self.annotations = DEMO_FOLDER / "captions.json" if annotations == "demo" else Path(annotations).expanduser()
        self.max_images = max_images
        self.height = height
        self.width = width
        self.fit = fit
        self.skip_uncaptioned = skip_uncaptioned
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
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < 8 or pixels % 8:
                raise ValueError(f"{name} is {pixels} pixels; give a multiple of 8 from 8 up.")
        if self.fit not in ("crop", "pad", "stretch"):
            raise ValueError(f"fit is {self.fit!r}; give crop, pad or stretch.")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images is {self.max_images}; give a number from 1 up, or null for all images.")
        if not self.images_dir.is_dir():
            raise ValueError(f"images_dir {self.images_dir} is not a folder; give the folder that holds the images.")
        self._entries = self._choose(read_captions(self.annotations))

    def _choose(self, coco: COCO) -> list[CocoEntry]:
        """The images of the run: those in the folder, in order of id, with captions, `max_images` at most."""
        images = [coco.imgs[key] for key in sorted(coco.imgs)]
        present = [image for image in images if (self.images_dir / image["file_name"]).is_file()]
        if not present:
            raise ValueError(
                f"None of the {len(images)} images that {self.annotations} names is in images_dir {self.images_dir} "
                f"({images[0]['file_name']} for one); give the folder and the captions of the same images."
            )
        entries = [
            CocoEntry(
                str(image["id"]),
                self.images_dir / image["file_name"],
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
                f"None of the {len(present)} images in {self.images_dir} has a caption in {self.annotations}; "
                "give the captions of these images."
            )
        if len(present) < len(images):
            missing = len(images) - len(present)
            first = f"; max_images takes the first {len(entries)}" if len(entries) == self.max_images else ""
            rank_zero_info(
                f"using {len(present)} of {len(images)} annotated images: {missing} are not in {self.images_dir}{first}"
            )
        if num_left_out:
            rank_zero_info(f"leaving out {num_left_out} images without a caption in {self.annotations}")
        return entries


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
