"""The LightningModule that runs a diffusers pipeline: subclass it for a new model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from typing_extensions import override

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.loading import (
    WeightsSource,
    check_pretrained,
    describe_weights,
    load_pipeline,
    prepare_download,
)
from asyncdiff_pl.models.noise import noise_from, sample_seed
from asyncdiff_pl.models.random_weights import component_class
from asyncdiff_pl.models.schedulers import (
    build_scheduler,
    check_learned_variance,
    check_scheduler_config,
    find_scheduler,
)
from asyncdiff_pl.models.sources import read_index
from asyncdiff_pl.parallel.api import denoiser_of
from asyncdiff_pl.parallel.host_side import HostSide
from asyncdiff_pl.parallel.trajectory import Trajectory
from asyncdiff_pl.sampling.respaced import RespacedScheduler

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Prediction:
    """What a pipeline made of one sample.

    Args:
        sample: What it was made from.
        steps: Number of denoising steps it took.
        frames: One picture, or the frames of a video in order.
        seconds: Wall time of the whole pipeline call, in s; a call for several samples is shared out evenly.
        timed: False where `seconds` holds one-time work (the first call of a process, or with a new shape): averages
            leave it out.
        call: Number of the pipeline call in its batch, from 0.
        metrics: Filled by callbacks; each entry becomes a column of samples.csv.
        pending: What callbacks still do with it beside the run; only when all of it is done without an error is the
            sample finished, and gets its row in samples.csv.
    """

    sample: Sample
    steps: int
    frames: list[Image.Image]
    seconds: float
    timed: bool
    call: int = 0
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    pending: list[Future[None]] = field(default_factory=list, repr=False, compare=False)


class DiffusionPredictor(LightningModule):
    """Runs a diffusers pipeline on each sample; a subclass says how to call it.

    Args:
        pretrained: Checkpoint: a hub name, a local folder, or the name of an embedded model.
        num_inference_steps: Number of denoising steps; a list runs every sample with each of them.
        scheduler: The checkpoint's own if null, else a name (`euler_discrete`, `ddpm`, `ddim`, ...) or a class
            (`diffusers.DPMSolverMultistepScheduler`); it is built from the checkpoint's own scheduler config.
        seed: Seed of the run; each sample's noise follows from it and from the sample's id.
        dtype: Number format of weights and activations.
        weights: `pretrained` loads the checkpoint's weights; `random` builds the same network without them, for
            latency alone: its pictures mean nothing, and the results say so.
        variant: Variant of the checkpoint's weight files, `fp16` say; null takes the plain files.
        scheduler_config: Entries of the scheduler's config that differ from the checkpoint's, `{beta_schedule: linear}`
            say.
    """

    pipeline_class: type[DiffusionPipeline] = DiffusionPipeline
    """Which pipeline to build; the general class lets the checkpoint say."""

    def __init__(
        self,
        pretrained: str,
        num_inference_steps: int | list[int] = 25,
        scheduler: str | None = None,
        seed: int = 0,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        weights: WeightsSource = "pretrained",
        variant: str | None = None,
        scheduler_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        steps = [num_inference_steps] if isinstance(num_inference_steps, int) else list(num_inference_steps)
        if not steps or min(steps) < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give one or more numbers from 1 up.")
        if len(set(steps)) < len(steps):
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give each number once.")
        self.pretrained = pretrained
        self.num_inference_steps = steps
        """Step counts of the run, one or more."""
        self.scheduler_name = scheduler
        self.scheduler_config = dict(scheduler_config or {})
        self.seed = seed
        self.torch_dtype = DTYPES[dtype]
        self.weights = weights
        self.variant = variant
        self.components: dict[str, Any] = {}
        """Parts that a subclass loads from elsewhere, by name."""
        self._pipeline: DiffusionPipeline | None = None
        self._trajectory: Trajectory | None = None
        self.samples_in_work: list[Sample] = []
        """Samples of the pipeline's call in work, or of the last one."""
        self.is_warm = False
        """False until a whole call has run: what comes before holds one-time work and is not timed."""

    # -- what a subclass says -----------------------------------------------------------------------------------

    def generate(
        self, samples: Sequence[Sample], num_inference_steps: int, generators: list[torch.Generator]
    ) -> list[list[Image.Image]]:
        """Calls `self.pipeline` for some samples.

        Args:
            samples: The samples of one call.
            num_inference_steps: Number of denoising steps.
            generators: One a sample, seeded: the noise must come from these.

        Returns:
            For each sample its frames; a single picture is a list of one.
        """
        raise NotImplementedError(f"{type(self).__name__} must say in `generate` how its pipeline is called.")

    def group(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples of a batch, in the groups that one call of the pipeline each can make."""
        return [list(samples)]

    def load(self) -> DiffusionPipeline:
        """Loads or builds the pipeline, on the CPU."""
        return load_pipeline(self.pipeline_class, self.pretrained, self.weights, self.torch_dtype, self.variant)

    @property
    def frames_per_sample(self) -> int:
        """Pictures that each sample yields, to foresee the disk space."""
        return 1

    def picture_size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """Size of what is generated, as far as it is known before anything is loaded.

        Args:
            height: Height of the data's pictures, in pixels; None where it is not known.
            width: Width of the data's pictures, in pixels; None where it is not known.

        Returns:
            Height and width, in pixels.
        """
        return height, width

    @property
    def size_multiple(self) -> int | None:
        """What height and width of the pictures must be multiples of, in pixels; None if it is not known yet."""
        return None

    @property
    def is_guided(self) -> bool | None:
        """Whether the denoiser gets a guidance batch, two inputs for each sample; None if it is not known yet."""
        return None

    def example_call(self, height: int, width: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
        """A denoiser on the meta device and the arguments of one call, to foresee a run's time.

        Args:
            height: Height of what is generated, in pixels.
            width: Width of what is generated, in pixels.

        Returns:
            The denoiser without weights, positional and keyword arguments; None if the module cannot tell.
        """
        return None

    @property
    def why_unforeseen(self) -> str:
        """What `example_call` lacks where it gives nothing, and what to do, in a sentence."""
        if type(self).example_call is DiffusionPredictor.example_call:
            return (
                f"{type(self).__name__} does not say how its denoiser is called (`example_call`); runs need none of it."
            )
        return (
            f"The architecture of {self.pretrained} is not known here: give a local folder with the checkpoint's JSON "
            "files as pretrained (no weights are needed)."
        )

    # -- the pipeline -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Tells bad arguments early, before any weight is loaded.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        check_pretrained(self.pipeline_class, self.pretrained, self.weights, self.components)
        kind = None if self.scheduler_name is None else find_scheduler(self.scheduler_name)
        if kind is None and self.scheduler_config:
            index = read_index(self.pretrained)
            kind = None if index is None else component_class(*index["scheduler"])
        if kind is not None:
            check_scheduler_config(kind, self.scheduler_config)

    @property
    def weights_description(self) -> str:
        """`pretrained` or `random`: what the weights really are."""
        return describe_weights(self.pretrained, self.weights)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline, on every rank."""
        if self._pipeline is None:
            raise RuntimeError("The pipeline exists only after `configure_model()`.")
        return self._pipeline

    @property
    def denoiser(self) -> nn.Module:
        """The network that the pipeline calls in each step."""
        return denoiser_of(self.pipeline)

    @property
    def trajectory(self) -> Trajectory:
        """Where the pipeline stands: callbacks and strategies subscribe to it."""
        if self._trajectory is None:
            raise RuntimeError("The trajectory exists only after `configure_model()`.")
        return self._trajectory

    @override
    def prepare_data(self) -> None:
        """Downloads the checkpoint on one rank of each node, while the others wait."""
        prepare_download(self.pipeline_class, self.pretrained, self.weights, self.variant, self.components)

    @override
    def configure_model(self) -> None:
        """Loads the pipeline; a second call does nothing."""
        if self._pipeline is not None:
            return
        # Lightning would make every new tensor on the GPU: random weights must not depend on the device
        with torch.device("cpu"):
            pipeline = self.load()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = build_scheduler(self.scheduler_name, pipeline.scheduler, self.scheduler_config)
        if not isinstance(pipeline.scheduler, RespacedScheduler):
            check_learned_variance(denoiser_of(pipeline), pipeline.scheduler)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part.requires_grad_(False).eval())
        self._pipeline = pipeline
        self._trajectory = Trajectory(denoiser_of(pipeline), lambda: pipeline.scheduler)
        # as long as there is the pipeline
        HostSide(pipeline, denoiser_of(pipeline), self._trajectory)

    # -- a batch ------------------------------------------------------------------------------------------------

    @override
    def predict_step(self, batch: Sequence[Sample], batch_idx: int = 0) -> list[Prediction]:
        """Generates each sample of the batch, those of one step count in one call if the pipeline can."""
        predictions: list[Prediction] = []
        of_one_count = itertools.groupby(batch, key=self._steps_of)
        calls = ((steps, group) for steps, samples in of_one_count for group in self.group(list(samples)))
        for number, (steps, group) in enumerate(calls):
            predictions += self._run(group, steps, number)
        order = {id(sample): place for place, sample in enumerate(batch)}
        return sorted(predictions, key=lambda prediction: order[id(prediction.sample)])

    def _steps_of(self, sample: Sample) -> int:
        if sample.steps is not None:
            return sample.steps
        if len(self.num_inference_steps) == 1:
            return self.num_inference_steps[0]
        raise ValueError(
            f"num_inference_steps is {self.num_inference_steps}, but sample {sample.id} has no `steps`: "
            "let the data module serve a `StepSweep`."
        )

    def _run(self, samples: list[Sample], steps: int, call: int) -> list[Prediction]:
        # the noise is drawn on the CPU, so that a picture does not depend on the kind of device
        seeds = [sample_seed(self.seed, s.id) if s.seed is None else s.seed for s in samples]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.trajectory.has_one_time_work = False
        self.samples_in_work = samples
        started = self._now()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), noise_from(self.pipeline.scheduler, generators):
            # for what else a pipeline draws
            torch.manual_seed(seeds[0])
            frames = self.generate(samples, steps, generators)
        seconds = (self._now() - started) / len(samples)
        timed, self.is_warm = self.is_warm and not self.trajectory.has_one_time_work, True
        return [Prediction(s, steps, f, seconds, timed, call) for s, f in zip(samples, frames, strict=True)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
