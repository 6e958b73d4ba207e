"""Pictures of a DDPM by seeds: the same in any batch, in one file, and those of a run that goes on."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from asyncdiff_pl.callbacks import PictureArchive, Results
from asyncdiff_pl.data import Unconditional
from asyncdiff_pl.models import UnconditionalPredictor
from asyncdiff_pl.models.training import DDPM
from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.sampling.seeded_noise import seeded_normal

SETTINGS = {"dtype": "float32", "num_inference_steps": 3}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny network, not trained, whose last layer gives something."""
    torch.manual_seed(0)
    module = DDPM(size=8, channels=16, multipliers=(1, 2), blocks=1, attention=(4,))
    for parameter in module.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("exported")
    module.export(folder)
    return str(folder)


class Broken(Callback):
    """Ends a run after two batches."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 2:
            raise RuntimeError("broken")


def predict(exported, folder, data, *callbacks, **settings):
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="run", version=0),
        callbacks=[PictureArchive(), Results(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = UnconditionalPredictor(exported, **SETTINGS | settings)
    model.check()
    trainer.predict(model, datamodule=data, return_predictions=False)
    with np.load(folder / "run" / "version_0" / "pictures" / "steps=3.npz") as arrays:
        return arrays["id"].tolist(), arrays["images"].astype(int)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"sampler": "ddpm", "skip": "quadratic"}, {"eta": 0.5}], ids=str)
def test_a_picture_does_not_depend_on_its_batch(exported, tmp_path, settings):
    ids, images = predict(exported, tmp_path / "one", Unconditional(11, batch_size=11), **settings)
    assert ids == [str(number) for number in range(11)]
    assert images.shape == (11, 8, 8, 3)
    assert len({picture.tobytes() for picture in images}) == 11
    _, others = predict(exported, tmp_path / "four", Unconditional(11, batch_size=4), **settings)
    # rounding may differ with the size of a batch
    assert np.abs(images - others).max() <= 1
    # a later part of them by itself
    ids, last = predict(exported, tmp_path / "last", Unconditional(3, first=8), **settings)
    assert ids == ["8", "9", "10"]
    assert np.abs(images[8:] - last).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_adds_to_the_file(exported, tmp_path):
    whole = predict(exported, tmp_path / "whole", Unconditional(6, batch_size=2))
    with pytest.raises(RuntimeError, match="broken"):
        predict(exported, tmp_path / "parts", Unconditional(6, batch_size=2), Broken())
    ids, images = predict(exported, tmp_path / "parts", Unconditional(6, batch_size=2))
    assert ids == whole[0]
    assert np.array_equal(images, whole[1])
    assert len(list((tmp_path / "parts" / "run" / "version_0" / "pictures").iterdir())) == 1


def test_the_loop_is_what_it_says(exported):
    model = UnconditionalPredictor(exported, sampler="ddpm", variance="fixed_large", skip="quadratic", **SETTINGS)
    with pytest.warns(UserWarning, match=r"leaves noise in pictures of 3 steps .* set variance to fixed_small"):
        model.configure_model()
    pipeline = model.pipeline
    found = pipeline([7], 3, "pt").images
    state = seeded_normal(torch.tensor([7]), 0, (3, 8, 8)).double()
    levels = torch.cat([(1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0), torch.ones(1)])
    # √999 / 2 squared is 249.75
    for number, (time, after) in enumerate([(999, 250), (250, 0), (0, -1)], 1):
        level, following = levels[time], levels[after]
        with torch.no_grad():
            noise = pipeline.unet(state.float(), time).sample.double()
        clean = ((state - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-1, 1)
        beta = 1 - level / following
        mean = following.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - following) * state
        state = mean / (1 - level)
        if after >= 0:
            state = state + beta.sqrt() * seeded_normal(torch.tensor([7]), number, (3, 8, 8))
    torch.testing.assert_close(found.double(), (state / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


def test_one_rank_in_stages_makes_the_same(exported):
    """The house's hooks follow the pipeline's own scheduler."""
    model = UnconditionalPredictor(exported, **SETTINGS)
    model.configure_model()
    plain = model.pipeline([1, 2], 3, "np").images
    handle = parallelize(model.pipeline, stages=2, warm_up=3, simulate=True, trajectory=model.trajectory)
    assert np.array_equal(model.pipeline([1, 2], 3, "np").images, plain)
    handle.remove()
    assert model.trajectory.position == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"eta": 2.0}, "eta is 2.0 and the sampler ddim; give ddim one from 0 to 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001, and .* has 1000 timesteps; give as many at most"),
    ],
)
def test_bad_settings(exported, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        UnconditionalPredictor(exported, **settings).check()


def test_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="number is 0 and first 0; give a number from 1 up and first from 0"):
        Unconditional(0).check()
