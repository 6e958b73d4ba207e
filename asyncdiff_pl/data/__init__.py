from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.classes import ClassLabels
from asyncdiff_pl.data.coco import CocoCaptions
from asyncdiff_pl.data.prompts import PromptFile
from asyncdiff_pl.data.sample import Sample, StepSweep, UnreadableSample

__all__ = [
    "ClassLabels",
    "CocoCaptions",
    "PromptFile",
    "Sample",
    "SampleDataModule",
    "StepSweep",
    "UnreadableSample",
]
