"""Which classes' settings stand where in a config, and the parser that explains them."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from asyncdiff_pl import callbacks, data, models, strategies
from asyncdiff_pl.cli.help import FIT, PREDICT, TEST, VALIDATE, explain, sections
from asyncdiff_pl.cli.messages import one_sentence
from asyncdiff_pl.cli.picture_test import PictureTest
from asyncdiff_pl.data.scene_clips import SceneClips
from asyncdiff_pl.models.training import DDPM, VideoDenoiserTraining

CALLBACKS = {
    "clip_score": callbacks.CLIPScore,
    "reference_metrics": callbacks.ReferenceMetrics,
    "frechet_distance": callbacks.FrechetDistance,
    "precision_recall": callbacks.PrecisionRecall,
    "step_latency": callbacks.StepLatency,
    "device_stats": callbacks.DeviceStats,
    "traffic": callbacks.Traffic,
    "solver": callbacks.SolverProgress,
    "trajectories": callbacks.TrajectoryWriter,
    "frame_writer": callbacks.FrameWriter,
    "results": callbacks.Results,
    "progress_bar": callbacks.DiffusionProgressBar,
}
"""Callbacks of every `predict` run, by the key of their settings; more stand at `trainer.callbacks`."""

SETTINGS = {
    "model": models.VideoPredictor,
    "data": data.CocoCaptions,
    "trainer.strategy": strategies.AsyncDiffStrategy,
    **CALLBACKS,
}
"""Classes whose settings `predict --help` explains, by where they stand in a config."""

OTHERS = {
    "model": [models.PipelinePredictor, models.UnconditionalPredictor],
    "data": [data.PromptFile, data.ClassLabels, data.Unconditional],
    "trainer.strategy": [strategies.PatchStrategy, strategies.StepParallelStrategy, strategies.TimeParallelStrategy],
}
"""Classes that may stand there in their place: `predict --help` explains what settings they have beyond the first's."""

TRAINING_CALLBACKS = {
    "average": callbacks.WeightAverage,
    "export": callbacks.ExportWeights,
    "state": callbacks.TrainingState,
    "progress_bar": callbacks.TrainingProgressBar,
}
"""Callbacks of every `fit` run; the average comes before what saves and exports it."""

TRAINING_SETTINGS = {"model": VideoDenoiserTraining, "data": SceneClips, **TRAINING_CALLBACKS}
"""Classes whose settings `fit --help` explains."""

TRAINING_OTHERS = {"model": [DDPM], "data": [data.Cifar10]}
"""Classes that may stand there in their place, likewise."""

TRAINED = ("fit", "validate", "test")
"""Subcommands that take configs of training."""

SAYS = {"predict": PREDICT, "fit": FIT, "validate": VALIDATE, "test": TEST}
"""What the help of each subcommand says of itself."""

EXPLAINED = {
    PREDICT.usage: (PREDICT, SETTINGS, OTHERS),
    FIT.usage: (FIT, TRAINING_SETTINGS, TRAINING_OTHERS),
    VALIDATE.usage: (VALIDATE, {"data": data.Cifar10}, {}),
    TEST.usage: (TEST, {"pictures": PictureTest, "data": data.Cifar10}, {}),
}
"""What the help of each subcommand is made of, by its usage."""


class Parser(LightningArgumentParser):
    """Explains our classes' settings in `--help`, and ends bad arguments in one sentence."""

    @override
    def format_help(self, *args: Any) -> str:
        if self.usage not in EXPLAINED:
            return super().format_help(*args)
        says, settings, others = EXPLAINED[self.usage]
        groups = self._action_groups
        # `fit --help` explains the callbacks of training, `test --help` what is tested
        hidden = {"model", "pictures", *TRAINING_CALLBACKS}
        self._action_groups = sections(self, says, {key.partition(".")[0] for key in settings} | hidden)
        try:
            return explain(super().format_help(*args), says, settings, others)
        finally:
            # classes are instantiated by the groups that they stand in
            self._action_groups = groups

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            # the parser of a class within: what it says becomes a part of the whole
            return super().error(message, ex)
        raise ValueError(one_sentence(str(message), self._subcommand)) from ex

    @property
    def _subcommand(self) -> str:
        return sys.argv[1] if sys.argv[1:2] and sys.argv[1] in TRAINED else "predict"
