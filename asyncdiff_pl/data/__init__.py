from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.cifar10 import Cifar10
from asyncdiff_pl.data.classes import ClassLabels
from asyncdiff_pl.data.coco import CocoCaptions
from asyncdiff_pl.data.prompts import PromptFile
from asyncdiff_pl.data.sample import Sample, StepSweep, UnreadableSample
from asyncdiff_pl.data.unconditional import Unconditional

__all__ = [
    "Cifar10",
    "ClassLabels",
    "CocoCaptions",
    "PromptFile",
    "Sample",
    "SampleDataModule",
    "StepSweep",
    "Unconditional",
    "UnreadableSample",
]
