"""The modules that run diffusion pipelines, one task a file."""

from asyncdiff_pl.models.adapters import IPAdapter, Lora
from asyncdiff_pl.models.base import DiffusionPredictor, Prediction
from asyncdiff_pl.models.pipeline import PipelinePredictor
from asyncdiff_pl.models.unconditional import UnconditionalPredictor
from asyncdiff_pl.models.video import VideoPredictor

__all__ = [
    "DiffusionPredictor",
    "IPAdapter",
    "Lora",
    "PipelinePredictor",
    "Prediction",
    "UnconditionalPredictor",
    "VideoPredictor",
]
