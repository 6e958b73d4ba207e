"""A tiny run: a real pipeline with a tiny network, real data module, Trainer and logger, on the CPU."""

from collections.abc import Sequence

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from asyncdiff_pl.data.base import SampleDataModule
from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.base import DiffusionPredictor
from asyncdiff_pl.parallel.trajectory import Trajectory


class TinyPredictor(DiffusionPredictor):
    """Draws `num_frames` pictures of 16 x 16 pixels; `fail_at` names the sample that it dies of."""

    def __init__(
        self,
        num_inference_steps=2,
        num_frames=3,
        fail_at=None,
        error=RuntimeError,
        weights="pretrained",
        **kwargs,
    ):
        super().__init__("tiny", num_inference_steps, dtype="float32", weights=weights, **kwargs)
        self.num_frames = num_frames
        self._fail_at = fail_at
        self._error = error
        self.made = []

    def prepare_data(self):
        pass

    def configure_model(self):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            add_attention=False,
        )
        pipeline = DDIMPipeline(unet, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        self._trajectory = Trajectory(unet, lambda: pipeline.scheduler)

    def generate(self, samples, num_inference_steps, generators):
        frames = []
        for sample, generator in zip(samples, generators, strict=True):
            if sample.id == self._fail_at:
                raise self._error
            self.made.append((num_inference_steps, sample.id))
            frames.append(self.pipeline(self.num_frames, generator, num_inference_steps=num_inference_steps).images)
        return frames


class Listed(Dataset):
    def __init__(self, ids, captions):
        self.ids = ids
        self.captions = captions

    def __getitem__(self, index):
        name = self.ids[index]
        captions = tuple(text.format(name) for text in self.captions)
        return Sample(name, captions, Image.new("RGB", (24, 16), (0, 90, 9 * index)))


class ListedSamples(SampleDataModule):
    def __init__(
        self,
        ids: Sequence[str],
        batch_size: int = 1,
        colour: str = "green",
        captions: Sequence[str] = ("a picture of {}", "some noise"),
    ):
        super().__init__(batch_size)
        self._names = list(ids)
        self.colour = colour
        self._captions = captions

    def samples(self):
        return Listed(self._names, self._captions)

    def ids(self):
        return self._names


class Run:
    """Starts runs into one log folder, and reads what they left there."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, callbacks, module=None, ids=("1", "2", "10"), bar=False, **data):
        logger = TensorBoardLogger(self.folder.parent, name="", version=self.folder.name, default_hp_metric=False)
        self.trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=logger,
            callbacks=list(callbacks),
            enable_progress_bar=bar,
            enable_model_summary=False,
        )
        self.module = module or TinyPredictor()
        return self.trainer.predict(self.module, datamodule=ListedSamples(ids, **data))

    def events(self):
        self.trainer.logger.experiment.flush()
        events = EventAccumulator(str(self.folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
        return events.Reload()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.fixture
def tiny_predictor():
    return TinyPredictor
