from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.coco import CocoCaptions
from asyncdiff_pl.data.sample import Sample, StepSweep, UnreadableSample

__all__ = ["CocoCaptions", "Sample", "SampleDataModule", "StepSweep", "UnreadableSample"]
