"""The modules that run diffusion pipelines, one task a file."""

from asyncdiff_pl.models.base import DiffusionPredictor, Prediction
from asyncdiff_pl.models.video import VideoPredictor

__all__ = ["DiffusionPredictor", "Prediction", "VideoPredictor"]
