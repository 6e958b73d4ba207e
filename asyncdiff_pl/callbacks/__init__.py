"""What watches a predict run: scores, times, memory, traffic, files and tables; each is usable alone."""

from asyncdiff_pl.callbacks.clip_score import CLIPScore
from asyncdiff_pl.callbacks.device_stats import DeviceStats
from asyncdiff_pl.callbacks.frame_writer import FrameWriter
from asyncdiff_pl.callbacks.progress import DiffusionProgressBar
from asyncdiff_pl.callbacks.results import Results
from asyncdiff_pl.callbacks.step_latency import StepLatency
from asyncdiff_pl.callbacks.traffic import Traffic

__all__ = [
    "CLIPScore",
    "DeviceStats",
    "DiffusionProgressBar",
    "FrameWriter",
    "Results",
    "StepLatency",
    "Traffic",
]
