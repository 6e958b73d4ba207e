"""Scenes: captioned clips of a few objects before a background, without end, drawn by torch on any device."""

from asyncdiff_pl.data.scenes.attributes import (
    BACKGROUNDS,
    CLASS_NAMES,
    NUM_CLASSES,
    SIZES,
    Scenes,
    class_caption,
    class_of,
)
from asyncdiff_pl.data.scenes.captions import NUM_WORDINGS, captions
from asyncdiff_pl.data.scenes.changed_captions import changed_captions
from asyncdiff_pl.data.scenes.coco_folder import write_coco
from asyncdiff_pl.data.scenes.draw import draw
from asyncdiff_pl.data.scenes.numbers import SPLITS, Split
from asyncdiff_pl.data.scenes.sampling import sample_scenes

__all__ = [
    "BACKGROUNDS",
    "CLASS_NAMES",
    "NUM_CLASSES",
    "NUM_WORDINGS",
    "SIZES",
    "SPLITS",
    "Scenes",
    "Split",
    "captions",
    "changed_captions",
    "class_caption",
    "class_of",
    "draw",
    "sample_scenes",
    "write_coco",
]
