"""The strategy of patches without any process: settings, early checks, advice; and one process that plays all ranks."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from worlds import environment, over, predict  # noqa: F401

from asyncdiff_pl.data import CocoCaptions
from asyncdiff_pl.models import PipelinePredictor, VideoPredictor
from asyncdiff_pl.strategies import PatchStrategy

SIZE = 128
"""Pixels of the pictures: 16 rows of latents, which are two patches of 8 at four levels."""


@pytest.fixture(scope="module")
def tiny(small_svd):
    return lambda **settings: VideoPredictor(
        small_svd, num_frames=2, dtype="float32", **{"num_inference_steps": 4, **settings}
    )


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"patches": 0}, "patches is 0; give 1 or more"),
        ({"cfg": 3}, "cfg is 3; it must be 1 .* or 2"),
        ({"mode": "corrected"}, "mode is corrected; give one of full_sync, corrected_async_gn, stale_gn"),
        ({"warm_up": 0}, "warm_up is 0; at least 1 synchronous step"),
        ({"mode": "stale_gn", "portion": 2.0}, "portion is 2.0; give a share of the neighbours' rows from 0 to 1"),
        ({"portion": 0.3}, "mode full_sync computes exactly, and portion 0.3 is for modes with stale rows"),
        ({"mode": "naive", "portion": 0.3}, "mode naive sees no other rows"),
        ({"timeout": 0.0}, "timeout is 0.0 s; give a number of seconds above 0"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PatchStrategy(**settings)


@pytest.mark.parametrize(
    ("settings", "devices"),
    [({}, 2), ({"patches": 3}, 6), ({"cfg": 2}, 4), ({"patches": 1}, 1), ({"patches": 4, "simulate": True}, 1)],
)
def test_ranks_that_fit(settings, devices):
    over(PatchStrategy(**settings), devices).check()


@pytest.mark.parametrize(
    ("settings", "devices", "sentence"),
    [
        ({"patches": 3}, 2, "cfg 1 x patches 3 = 3 ranks does not fit 2 ranks: .* a multiple of 3, or change patches"),
        ({"cfg": 2}, 6, "cfg 2 x patches 2 = 4 ranks does not fit 6 ranks"),
    ],
)
def test_ranks_that_do_not_fit(settings, devices, sentence):
    with pytest.raises(ValueError, match=sentence):
        over(PatchStrategy(**settings), devices).check()


def test_who_runs_which_samples():
    strategy = over(PatchStrategy(cfg=2), 8, rank=5)
    assert strategy.distributed_sampler_kwargs == {"rank": 1, "num_replicas": 2}
    assert not strategy.is_group_leader


def test_describe_names_every_setting_but_the_timeout():
    given = {"patches": 3, "mode": "stale_gn", "warm_up": 2, "portion": 0.5, "cfg": 2}
    given |= {"capture": True, "compile": "blocks", "share_encoding": True, "simulate": True}
    assert PatchStrategy(**given).describe() == {"strategy": "patches"} | given
    assert set(inspect.signature(PatchStrategy).parameters) - set(given) == {"timeout"}


def test_its_name_stands_for_two_patches():
    assert StrategyRegistry.get("patches").patches == 2


# -- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, 128), ({"patches": 3}, 192), ({"patches": 1}, 64), ({"patches": 9}, None)],
)
def test_a_picture_with_rows_for_all_patches(tiny, settings, size):
    PatchStrategy(**settings).check_module(tiny(), (size, size))


@pytest.mark.parametrize(
    ("settings", "size", "sentence"),
    [
        ({}, 64, "2 patches do not fit 8 rows of latents: each takes a multiple of 8 rows, so that at most 1 fit"),
        ({"patches": 5, "cfg": 2}, 256, "5 patches do not fit 32 rows of latents"),
        ({}, 96, "The latents have 12 rows, .* in multiples of 8"),
    ],
)
def test_a_picture_with_too_few_rows(tiny, settings, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        PatchStrategy(**settings).check_module(tiny(), (size, size))


def test_a_trainer_asks_before_it_loads_weights(tiny):
    module = tiny()
    module.trainer = SimpleNamespace(datamodule=CocoCaptions("demo", "demo", height=64, width=64))
    with pytest.raises(ValueError, match="2 patches do not fit 8 rows of latents"):
        PatchStrategy().connect(module)


def test_a_denoiser_without_rows():
    with pytest.raises(ValueError, match="denoiser of tiny-dit is a DiTTransformer2DModel: take AsyncDiffStrategy"):
        PatchStrategy().check_module(PipelinePredictor("tiny-dit", guidance_scale=4.0))


def test_a_split_of_guidance_that_is_off(tiny):
    with pytest.raises(ValueError, match="guidance is off: turn it on"):
        PatchStrategy(cfg=2).check_module(tiny(max_guidance_scale=1.0))


def test_a_module_without_a_pipeline():
    trainer = Trainer(strategy=PatchStrategy(simulate=True), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match="PatchStrategy runs modules that have a diffusers `pipeline`"):
        trainer.predict(LightningModule(), CocoCaptions("demo", "demo"))


@pytest.mark.parametrize(
    ("steps", "settings", "advice"),
    [
        (25, {"mode": "stale_gn"}, None),
        (4, {}, None),
        (4, {"mode": "naive"}, None),
        (4, {"patches": 1, "mode": "stale_gn"}, None),
        (
            [4, 25],
            {"mode": "stale_gn"},
            "With 4 denoising steps, warm_up 4 makes all of them synchronous, and mode sta",
        ),
        ([6, 8], {"mode": "no_sync"}, "With 6 or 8 denoising steps, warm_up 4 leaves 2 or 4 in which messages travel"),
    ],
)
def test_what_asynchrony_leaves_in_few_steps(tiny, steps, settings, advice):
    found = PatchStrategy(**settings).advice(tiny(num_inference_steps=steps))
    assert found is None if advice is None else found.startswith(advice)


# -- one process ------------------------------------------------------------------------------------------------------


def pixels(frames):
    return np.array([list(frame) for frame in frames])


@pytest.fixture(scope="module")
def plain(tiny):
    return pixels(predict(tiny(), "auto", size=SIZE))


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg": 2}, {"mode": "stale_gn", "warm_up": 4}, {"patches": 1, "mode": "stale_gn", "simulate": False}],
    ids=str,
)
def test_exact_modes_make_the_pictures_of_one_gpu(tiny, plain, settings):
    made = pixels(predict(tiny(), PatchStrategy(**{"simulate": True} | settings), size=SIZE))
    assert np.abs(made - plain).max() <= 1


@pytest.mark.parametrize("settings", [{"mode": "corrected_async_gn", "portion": 0.5}, {"mode": "naive"}], ids=str)
def test_other_modes_make_other_pictures_and_always_the_same(tiny, plain, settings):
    made, again = (
        pixels(predict(tiny(), PatchStrategy(warm_up=1, simulate=True, **settings), size=SIZE)) for _ in range(2)
    )
    assert np.abs(made - plain).max() > 1
    assert np.array_equal(made, again)


def test_nothing_is_left_on_the_denoiser(tiny, plain):
    module = tiny()
    strategy = PatchStrategy(mode="no_sync", warm_up=1, simulate=True)
    predict(module, strategy, images=1, size=SIZE)
    assert strategy.handle is None
    assert np.array_equal(pixels(predict(module, "auto", size=SIZE)), plain)
