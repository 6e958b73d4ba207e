"""The average of the weights, and what the progress of training says."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from asyncdiff_pl.callbacks import TrainingProgressBar, TrainingState, WeightAverage
from asyncdiff_pl.callbacks.training_progress import duration


class Line(LightningModule):
    """Weights that grow by one in each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.tensor(3))

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_the_average_is_short_at_first():
    average, module = WeightAverage(decay=0.5), Line()
    Trainer(
        max_steps=12,
        accelerator="cpu",
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, [0] * 20)
    expected = 1.0
    for step in range(2, 13):
        # the step before the update counts
        decay = min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
    # after training the module holds the average
    assert module.weight.tolist() == pytest.approx([expected] * 2, abs=1e-5)
    assert 10 < expected < 12
    assert module.count == 3


def test_the_average_is_on_the_device_that_the_module_goes_to():
    average, module = WeightAverage(), Line()
    average.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta"))), module, "fit")
    assert average._average_model.module.weight.is_meta
    assert module.weight.device.type == "cpu"


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "9 s"), (123, "2 min 03 s"), (3900, "1 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WeightAverage(1.0), "decay is 1.0; give a number from 0 to below 1"),
        (lambda: TrainingState(0), "every_n_steps is 0; give a number of steps from 1 up"),
        (lambda: TrainingProgressBar(refresh_seconds=-1), "refresh_seconds is -1; give a number of seconds from 0 up"),
    ],
)
def test_bad_settings(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
