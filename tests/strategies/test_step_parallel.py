"""The strategy of steps without any process: settings, early checks, advice; and one process that plays all ranks."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.strategies import StrategyRegistry
from worlds import environment, over, predict  # noqa: F401

from asyncdiff_pl.models import VideoPredictor
from asyncdiff_pl.strategies import StepParallelStrategy


@pytest.fixture(scope="module")
def tiny(small_svd):
    return lambda **settings: VideoPredictor(
        small_svd, num_frames=2, dtype="float32", **{"num_inference_steps": 5, **settings}
    )


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"cfg": 3}, r"cfg is 3; it must be 1 .* or 2"),
        ({"warm_up": 0}, "warm_up is 0; at least 1 exact step"),
        ({"timeout": 0.0}, r"timeout is 0.0 s; give a number of seconds above 0"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        StepParallelStrategy(**settings)


@pytest.mark.parametrize(
    ("settings", "devices"),
    [({}, 2), ({"steps": 3}, 6), ({"cfg": 2}, 4), ({"steps": 1}, 1), ({"steps": 4, "simulate": True}, 1)],
)
def test_ranks_that_fit(settings, devices):
    over(StepParallelStrategy(**settings), devices).check()


def test_ranks_that_do_not_fit():
    sentence = "cfg 2 x steps 2 = 4 ranks does not fit 6 ranks: start a multiple of 4, or change steps or cfg"
    with pytest.raises(ValueError, match=sentence):
        over(StepParallelStrategy(cfg=2), 6).check()


def test_who_runs_which_samples():
    strategy = over(StepParallelStrategy(cfg=2), 8, rank=5)
    assert strategy.distributed_sampler_kwargs == {"rank": 1, "num_replicas": 2}
    assert not strategy.is_group_leader


def test_describe_names_every_setting_but_the_timeout():
    """The denoising steps of a sample are a column of results.csv already."""
    given = {"warm_up": 2, "cfg": 2, "capture": True, "compile": "blocks", "simulate": True, "share_encoding": True}
    described = StepParallelStrategy(steps=3, **given).describe()
    assert described == {"strategy": "steps", "parallel_steps": 3} | given
    assert set(inspect.signature(StepParallelStrategy).parameters) - set(given) == {"steps", "timeout"}


def test_its_name_stands_for_two_steps():
    assert StrategyRegistry.get("steps").steps == 2


# -- modules ----------------------------------------------------------------------------------------------------------


def test_a_split_of_guidance_that_is_off(tiny):
    with pytest.raises(ValueError, match="guidance is off: turn it on"):
        StepParallelStrategy(cfg=2).check_module(tiny(max_guidance_scale=1.0))


@pytest.mark.parametrize(
    ("steps", "settings", "advice"),
    [
        (25, {}, None),
        # two are left
        (5, {}, None),
        (4, {"steps": 1}, None),
        (4, {}, "With 4 denoising steps, warm_up 3 leaves no two of them to be computed at a time"),
        ([2, 3, 25], {}, "With 2 or 3 denoising steps, warm_up 3 leaves no two of them"),
    ],
)
def test_what_warm_up_leaves(steps, settings, advice):
    found = StepParallelStrategy(**settings).advice(SimpleNamespace(num_inference_steps=np.atleast_1d(steps).tolist()))
    assert found is None if advice is None else found.startswith(advice)


# -- one process ------------------------------------------------------------------------------------------------------


def pixels(frames):
    return np.array([list(frame) for frame in frames])


def pixels_of_others(frames):
    """Other samples' pictures."""
    return np.roll(frames, len(frames) // 2, 0)


@pytest.fixture(scope="module")
def plain(tiny):
    return pixels(predict(tiny(), "auto"))


@pytest.mark.parametrize("settings", [{"warm_up": 4, "steps": 3}, {"steps": 1}], ids=str)
def test_exact_steps_make_the_pictures_of_one_gpu(tiny, plain, settings):
    assert np.array_equal(pixels(predict(tiny(), StepParallelStrategy(simulate=True, **settings))), plain)


@pytest.mark.parametrize("scheduler", [None, "euler_ancestral_discrete"])
def test_rounds_make_other_pictures_and_always_the_same(tiny, plain, scheduler):
    """Also with noise that each sample's generator gives in each step."""
    settings = {"steps": 4, "warm_up": 1, "cfg": 2, "simulate": True}
    made, again = (pixels(predict(tiny(scheduler=scheduler), StepParallelStrategy(**settings))) for _ in range(2))
    assert np.array_equal(made, again)
    exact = plain if scheduler is None else pixels(predict(tiny(scheduler=scheduler), "auto"))
    assert np.abs(made - exact).max() > 1
    assert np.abs(made - exact).mean() < 0.5 * np.abs(made - pixels_of_others(exact)).mean()


def test_what_it_tells_callbacks(tiny, plain):
    module, strategy = tiny(), StepParallelStrategy(warm_up=3, simulate=True)
    told = []
    module.on_predict_batch_end = lambda *_: told.append((strategy.traffic(), strategy.handle.exact_steps))
    predict(module, strategy, images=1)
    frames, channels, size, halves = 2, 4, 8, 2
    # two steps in one round, each rank's estimate to the other
    sent = 2 * halves * frames * channels * size * size * 4
    assert told == [({"sent_bytes": sent, "steps": 2}, 3)]
    assert strategy.handle is None
    del module.on_predict_batch_end
    assert np.array_equal(pixels(predict(module, "auto")), plain)
