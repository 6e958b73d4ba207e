"""What watches a run: scores, times, memory, traffic, solvers, files, tables; averages, state, export of training."""

from asyncdiff_pl.callbacks.averaging import WeightAverage
from asyncdiff_pl.callbacks.clip_score import CLIPScore
from asyncdiff_pl.callbacks.device_stats import DeviceStats
from asyncdiff_pl.callbacks.export import ExportWeights
from asyncdiff_pl.callbacks.frame_writer import FrameWriter
from asyncdiff_pl.callbacks.frechet_distance import FrechetDistance
from asyncdiff_pl.callbacks.picture_archive import PictureArchive
from asyncdiff_pl.callbacks.precision_recall import PrecisionRecall
from asyncdiff_pl.callbacks.progress import DiffusionProgressBar
from asyncdiff_pl.callbacks.reference_metrics import ReferenceMetrics
from asyncdiff_pl.callbacks.results import Results
from asyncdiff_pl.callbacks.solver import SolverProgress
from asyncdiff_pl.callbacks.step_latency import StepLatency
from asyncdiff_pl.callbacks.traffic import Traffic
from asyncdiff_pl.callbacks.training_progress import TrainingProgressBar
from asyncdiff_pl.callbacks.training_state import TrainingState
from asyncdiff_pl.callbacks.trajectory_writer import TrajectoryWriter
from asyncdiff_pl.callbacks.validation_table import ValidationTable

__all__ = [
    "CLIPScore",
    "DeviceStats",
    "DiffusionProgressBar",
    "ExportWeights",
    "FrameWriter",
    "FrechetDistance",
    "PictureArchive",
    "PrecisionRecall",
    "ReferenceMetrics",
    "Results",
    "SolverProgress",
    "StepLatency",
    "Traffic",
    "TrainingProgressBar",
    "TrainingState",
    "TrajectoryWriter",
    "ValidationTable",
    "WeightAverage",
]
