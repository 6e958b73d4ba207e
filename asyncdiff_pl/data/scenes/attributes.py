"""What a scene is made of: the names that captions tell, and the tensors that hold a batch of scenes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white")
SIZES = ("small", "medium", "large")
MATERIALS = ("matte", "glossy", "metallic", "striped", "dotted", "outlined")
BACKGROUNDS = (
    "gradient",
    "spotlight",
    "stripes",
    "checkered floor",
    "hills",
    "mountains",
    "sea",
    "sunset",
    "clouds",
    "night sky",
    "blurred lights",
)
BACKGROUND_COLOURS = ("blue", "green", "pink", "purple", "gray", "orange", "red", "yellow", "brown")

# radius of each size in half frames: 12, 20 and 31 pixels of 128
RADII = (0.19, 0.31, 0.485)

CLASS_NAMES: list[str] = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
NUM_CLASSES = len(CLASS_NAMES)


@dataclass
class Scenes:
    """A batch of B scenes of up to O objects: attributes that captions name, and what motion and drawing need.

    Lengths are in half frames: the frame reaches from -1 to 1, x to the right and y downwards. Times are in seconds.
    Objects beyond a scene's number are there, but neither drawn nor named.

    Args:
        index: Index of each scene in its split, int64 (B,).
        number: Number of objects, 1 to O, int64 (B,).
        shape: Index into `SHAPES`, int64 (B, O); so are the next three into theirs.
        colour: Index into `COLOURS`; the objects of a scene have different colours.
        size: Index into `SIZES`.
        material: Index into `MATERIALS`.
        background: Index into `BACKGROUNDS`, int64 (B,).
        palette: Which of its palettes the background has, int64 (B,).
        background_colour: Index into `BACKGROUND_COLOURS`, int64 (B,): the colour that the palette is called by.
        position: Centres at time 0, float32 (B, O, 2).
        radius: Radii, float32 (B, O).
        path: Kind of path of each object, index into `motion.PATHS`, int64 (B, O).
        velocity: Speed and direction of each object, half frames a second, (B, O, 2).
        phase: Where in its cycle a periodic path begins, from 0 to 1, (B, O).
        angle: Rotation at time 0 in radians, (B, O).
        spin: Rotation a second in radians, (B, O).
        pulse: Amplitude and frequency (a second) of the change of size, as a share of the radius, (B, O, 2).
        pan: The camera's steady speed; the background moves the other way, (B, 2).
        sway: Amplitude and frequency of the camera's swaying, which objects take part in, (B, 2).
        horizon: Height of the horizon, (B,).
        offset: Where the background's textures, hills and lights begin, from 0 to 1, (B, 4).
    """

    index: Tensor
    number: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    material: Tensor
    background: Tensor
    palette: Tensor
    background_colour: Tensor
    position: Tensor
    radius: Tensor
    path: Tensor
    velocity: Tensor
    phase: Tensor
    angle: Tensor
    spin: Tensor
    pulse: Tensor
    pan: Tensor
    sway: Tensor
    horizon: Tensor
    offset: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: slice | Tensor) -> Scenes:
        """The scenes of a slice or of an index tensor."""
        return Scenes(**{field.name: getattr(self, field.name)[key] for field in dataclasses.fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Scenes:
        """The same scenes on a device."""
        return Scenes(
            **{
                field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
                for field in dataclasses.fields(self)
            }
        )

    def pin_memory(self) -> Scenes:
        """The same scenes in page-locked memory, from where a GPU copies them without waiting."""
        return Scenes(**{field.name: getattr(self, field.name).pin_memory() for field in dataclasses.fields(self)})

    @property
    def max_objects(self) -> int:
        """O: the number of objects that the tensors have room for."""
        return self.shape.shape[1]


def class_of(scenes: Scenes) -> Tensor:
    """The class (shape and colour) of each scene's first object: index into `CLASS_NAMES`, int64 (B,)."""
    return scenes.shape[:, 0] * len(COLOURS) + scenes.colour[:, 0]


def class_caption(name: str) -> str:
    """A short caption of a class, for classification: "an orange star".

    Args:
        name: One of `CLASS_NAMES`.

    Raises:
        ValueError: There is no such class.
    """
    if name not in CLASS_NAMES:
        raise ValueError(f"class {name!r} is none of the {NUM_CLASSES}; give a name such as {CLASS_NAMES[0]!r}.")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
