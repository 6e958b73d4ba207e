"""The strategy that is parallel in time without any process: settings, early checks; and one process that plays all."""

import inspect

import numpy as np
import pytest
from lightning.pytorch.strategies import StrategyRegistry
from worlds import environment, over, predict  # noqa: F401

from asyncdiff_pl.models import VideoPredictor
from asyncdiff_pl.strategies import TimeParallelStrategy


@pytest.fixture(scope="module")
def tiny(small_svd):
    return lambda **settings: VideoPredictor(
        small_svd, num_frames=2, dtype="float32", **{"num_inference_steps": 3, **settings}
    )


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ranks": 0}, "ranks is 0; give 1 or more"),
        ({"tolerance": -1.0}, "tolerance is -1.0; give 0"),
        ({"variation_steps": 5}, "variation_steps is 5, but there is no initial_trajectory"),
        ({"initial_trajectory": "nowhere"}, "initial_trajectory is nowhere, which does not exist: give the log folder"),
        ({"timeout": 0.0}, r"timeout is 0.0 s; give a number of seconds above 0"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimeParallelStrategy(**settings)


@pytest.mark.parametrize(
    ("settings", "devices", "groups"),
    [({}, 8, 1), ({"ranks": 4}, 8, 2), ({"ranks": 1}, 2, 2), ({"ranks": 4, "simulate": True}, 1, 1)],
)
def test_groups(settings, devices, groups):
    strategy = over(TimeParallelStrategy(**settings), devices)
    strategy.check()
    assert strategy.data_size == groups


def test_ranks_that_do_not_fit():
    sentence = "cfg 1 x time 4 = 4 ranks does not fit 6 ranks: start a multiple of 4, or change time or cfg"
    with pytest.raises(ValueError, match=sentence):
        over(TimeParallelStrategy(ranks=4), 6).check()


def test_describe_names_every_setting_but_the_timeout(tmp_path):
    given = {"method": "triangular_anderson", "ranks": 3, "order": 5, "window": 7, "memory": 3, "tolerance": 0.5}
    given |= {"eta": 0.3, "max_iterations": 9, "safeguard": False, "batch": 4, "initial_trajectory": str(tmp_path)}
    given |= {"variation_steps": 2, "capture": True, "compile": "blocks"}
    given |= {"share_encoding": True, "simulate": True}
    assert TimeParallelStrategy(**given).describe() == {"strategy": "time"} | given
    assert set(inspect.signature(TimeParallelStrategy).parameters) - set(given) == {"timeout"}


def test_its_name_stands_for_all_devices():
    assert StrategyRegistry.get("time").ranks is None


def test_schedulers(tiny):
    TimeParallelStrategy().check_module(tiny(scheduler="ddim"))
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler cannot be solved in parallel in time.*; take ddim"):
        TimeParallelStrategy().check_module(tiny(scheduler="unipc_multistep"))


# -- one process ------------------------------------------------------------------------------------------------------


def pixels(frames):
    return np.array([list(frame) for frame in frames])


@pytest.mark.parametrize("scheduler", [None, "ddpm"])
def test_without_tolerance_it_makes_the_pictures_of_one_gpu(tiny, scheduler):
    """Also with noise that each sample's generator gives in each step."""
    plain = pixels(predict(tiny(scheduler=scheduler), "auto", images=2))
    module, strategy, told = tiny(scheduler=scheduler), TimeParallelStrategy(ranks=3, tolerance=0.0, simulate=True), []
    module.on_predict_batch_end = lambda *_: told.append((strategy.handle.solved.iterations, strategy.traffic()))
    made = pixels(predict(module, strategy, images=2))
    assert np.abs(made - plain).max() <= 1
    frames, channels, size = 2, 4, 8
    # the largest shares of 4 and of 2 inputs, from three ranks to two others
    sent = 3 * 2 * (2 + 1) * frames * channels * size * size * 4
    assert told == [([2], {"sent_bytes": sent * n, "steps": 2 * n}) for n in (1, 2)]
