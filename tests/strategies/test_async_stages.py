"""The strategy without any process: constructor, checks, numbering of ranks; and one process that plays all ranks."""

import re

import pytest
from diffusers.hooks import HookRegistry
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from worlds import environment, over, predict  # noqa: F401

from asyncdiff_pl.data import CocoCaptions
from asyncdiff_pl.models import VideoPredictor
from asyncdiff_pl.parallel import Layout, WarmUp
from asyncdiff_pl.parallel.stages import costs
from asyncdiff_pl.strategies import AsyncDiffStrategy

# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stages": 0}, "stages is 0; it must be from 1 to 8"),
        ({"stages": 9}, "stages is 9; it must be from 1 to 8"),
        ({"stages": 2, "stride": 3}, "stride is 3; it must be 1 or 2"),
        ({"stages": 2, "stride": 0}, "stride is 0; it must be 1 or 2"),
        ({"stride": 2}, "stride 2 needs at least 2 stages"),
        ({"cfg": 3}, "cfg is 3; it must be 1 .* or 2"),
        ({"stages": 2, "warm_up": 0}, "warm_up is 0; at least 1"),
        ({"stages": 2, "refresh_every": 0}, "refresh_every is 0; give 2 or more"),
        ({"stages": 2, "cut": [["conv_in"]]}, "The cut has 1 stages, but stages is 2; make them equal"),
        ({"balance": "measured"}, "balance measured finds a cut .*, and stages is 1, .*; take balance operations"),
        (
            {"stages": 2, "balance": "measured", "cut": [["a"], ["b"]]},
            "balance measured finds a cut .*, and a cut is given",
        ),
        ({"timeout": 0.0}, "timeout is 0.0 s; give a number of seconds above 0"),
        (
            {"layout": "auto", "stages": 2},
            "layout auto chooses .*, but stages is 2; set stages to 1, or take layout fixed",
        ),
        ({"layout": "auto", "cfg": 2}, "but cfg is 2; set cfg to 1"),
        ({"layout": "auto", "cut": [["conv_in"]]}, "The cut has 1 stages|but cut is"),
        ({"layout": "auto", "simulate": True}, "but simulate is True; set simulate to false"),
        (
            {"layout": "auto", "warm_up_mode": "relay", "warm_up": WarmUp(until_drift=0.1)},
            "warm_up_mode relay .* until_drift compares all of them",
        ),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        AsyncDiffStrategy(**settings)


@pytest.mark.parametrize(
    ("settings", "devices", "nodes"),
    [
        ({}, 1, 1),
        ({}, 3, 2),
        ({"stages": 2}, 2, 1),
        ({"stages": 2}, 4, 2),
        ({"stages": 3, "stride": 2, "cfg": 2}, 8, 1),
        ({"stages": 8, "simulate": True}, 1, 1),
        ({"stages": 3, "simulate": True}, 2, 1),
        ({"layout": "auto"}, 3, 2),
    ],
)
def test_ranks_that_fit(settings, devices, nodes):
    over(AsyncDiffStrategy(**settings), devices, nodes).check()


@pytest.mark.parametrize(
    ("settings", "devices", "nodes", "sentence"),
    [
        (
            {"stages": 2},
            1,
            1,
            "stages 2 . stride 1 - 1. = 2 ranks does not fit 1 ranks: start a multiple of 2",
        ),
        ({"stages": 2}, 3, 1, "= 2 ranks does not fit 3 ranks: start a multiple of 2"),
        ({"stages": 2, "stride": 2}, 4, 1, "= 3 ranks does not fit 4 ranks"),
        ({"cfg": 2}, 3, 1, "cfg 2 .* = 2 ranks does not fit 3 ranks"),
        ({"stages": 4}, 2, 2, "= 4 ranks must lie within a node, but each node has 2 ranks: start a multiple of 4"),
        ({"stages": 2}, 3, 2, "= 2 ranks must lie within a node, but each node has 3 ranks"),
    ],
)
def test_ranks_that_do_not_fit(settings, devices, nodes, sentence):
    with pytest.raises(ValueError, match=sentence):
        over(AsyncDiffStrategy(**settings), devices, nodes).check()


@pytest.mark.parametrize(
    ("settings", "devices", "nodes", "rank", "data", "is_leader"),
    [
        ({}, 2, 1, 1, (1, 2), True),
        ({"stages": 2}, 2, 1, 0, (0, 1), True),
        ({"stages": 2}, 2, 1, 1, (0, 1), False),
        ({"stages": 2}, 2, 2, 2, (1, 2), True),
        ({"stages": 2}, 2, 2, 3, (1, 2), False),
        ({"stages": 2, "cfg": 2}, 8, 1, 5, (1, 2), False),
        ({"stages": 3, "simulate": True}, 2, 1, 1, (1, 2), True),
        ({"layout": "auto"}, 4, 2, 0, (0, 2), True),
        ({"layout": "auto"}, 4, 2, 5, (1, 2), False),
    ],
)
def test_who_runs_which_samples(settings, devices, nodes, rank, data, is_leader):
    strategy = over(AsyncDiffStrategy(**settings), devices, nodes, rank)
    assert strategy.distributed_sampler_kwargs == {"rank": data[0], "num_replicas": data[1]}
    assert strategy.is_group_leader is is_leader


def test_groups_are_not_there_before_the_processes():
    with pytest.raises(RuntimeError, match="exist only after `setup_environment"):
        _ = AsyncDiffStrategy().groups


@pytest.mark.parametrize(
    ("warm_up", "described"),
    [(4, 4), (WarmUp(until_drift=0.1, at_most=9), "until drift 0.1, at most 9")],
)
def test_describe(warm_up, described):
    strategy = AsyncDiffStrategy(stages=2, stride=2, warm_up=warm_up, refresh_every=6, time_shift=True, cfg=2)
    assert strategy.describe() == {
        "strategy": "asyncdiff",
        "stages": 2,
        "stride": 2,
        "warm_up": described,
        "refresh_every": 6,
        "time_shift": True,
        "cfg": 2,
        "layout": "fixed",
        "capture": None,
        "compile": "none",
        "balance": "operations",
        "warm_up_mode": "replicated",
        "folded": False,
        "share_encoding": False,
        "simulate": False,
        "cut": None,
    }


def test_its_name_stands_for_two_stages():
    assert StrategyRegistry.get("asyncdiff").stages == 2


# -- modules ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(small_svd):
    return lambda **settings: VideoPredictor(
        small_svd, num_frames=2, dtype="float32", **{"num_inference_steps": 4, **settings}
    )


@pytest.mark.parametrize(
    ("steps", "settings", "advice"),
    [
        (9, {"stages": 2}, None),
        (
            3,
            {"stages": 2},
            "With 3 denoising steps, warm_up 3 leaves none for 2 stages to gain time in: take",
        ),
        ([1, 2, 8], {"stages": 3}, "With 1 or 2 denoising steps, warm_up 3 leaves none for 3 stages"),
        (1, {"cfg": 2}, None),
        (
            2,
            {"stages": 2, "warm_up": WarmUp(until_drift=0.1)},
            "With 2 denoising steps, warm_up until drift 0.1 leaves",
        ),
    ],
)
def test_a_warm_up_that_takes_all_steps(tiny, steps, settings, advice):
    found = AsyncDiffStrategy(**settings).advice(tiny(num_inference_steps=steps))
    assert found is None if advice is None else found.startswith(advice)


@pytest.mark.parametrize(
    ("steps", "settings", "advice"),
    [
        (
            4,
            {"stages": 2},
            "With 4 denoising steps, warm_up 3 leaves at most 1 for 2 stages to gain time in, a speed-up",
        ),
        ([4, 8, 30], {"stages": 2}, "4 or 8 denoising steps, .* at most 1 or 5 .* speed-up of 1.1 or 1.5 at best"),
        # 8 / (1 + 1 + 6 / 8): one step in seven is exact once more
        (8, {"stages": 4, "stride": 2, "warm_up": 1, "refresh_every": 7}, "at most 6 .* a speed-up of 2.9 at best"),
        (8, {"stages": 2, "warm_up": WarmUp(until_noise=0.9)}, "warm_up until noise 0.9 leaves at most 7 for 2 stages"),
    ],
)
def test_a_few_step_model_is_told_what_is_left(tiny, steps, settings, advice):
    module = tiny(num_inference_steps=steps)
    assert re.search(advice, AsyncDiffStrategy(**settings).advice(module))


@pytest.mark.parametrize(
    ("guidance", "remedy"),
    [(3.0, "cfg 2 in place of stages, which is exact"), (1.0, "a sample for each rank .stages 1. in place of stages")],
)
@pytest.mark.parametrize("steps", [2, 5])
def test_what_a_few_step_model_should_take(tiny, steps, guidance, remedy):
    module = tiny(num_inference_steps=steps, max_guidance_scale=guidance)
    assert re.search(f"{remedy}.$", AsyncDiffStrategy(stages=2).advice(module))


def test_a_split_of_guidance_that_is_off(tiny):
    AsyncDiffStrategy(cfg=2).check_module(tiny())
    AsyncDiffStrategy(cfg=1).check_module(tiny(max_guidance_scale=1.0))
    with pytest.raises(ValueError, match="guidance is off: turn it on"):
        AsyncDiffStrategy(cfg=2).check_module(tiny(max_guidance_scale=1.0))


def test_a_module_without_a_pipeline():
    trainer = Trainer(strategy=AsyncDiffStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match="LightningModule has none: subclass DiffusionPredictor"):
        trainer.predict(LightningModule(), CocoCaptions("demo", "demo"))


# -- a layout for the devices -----------------------------------------------------------------------------------------


def chosen(module, devices, measures=False, **settings):
    strategy = over(AsyncDiffStrategy(layout="auto", **settings), devices)
    choice = strategy.choose(module, (64, 64), measures)
    strategy.settle(choice)
    described = strategy.describe()
    assert {name: described[name] for name in ("stages", "stride", "cfg")} == {
        "stages": choice.layout.stages,
        "stride": 1,
        "cfg": choice.layout.cfg,
    }
    return choice


@pytest.mark.parametrize(
    ("devices", "guidance", "settings", "layout"),
    [
        (1, 3.0, {}, Layout(1)),
        (2, 3.0, {}, Layout(1, cfg=2)),
        (3, 3.0, {}, Layout(3)),
        (4, 3.0, {}, Layout(2, cfg=2)),
        (4, 1.0, {}, Layout(4)),
        # a relay passes steps from stage to stage
        (2, 3.0, {"warm_up_mode": "relay"}, Layout(2)),
        # the whole denoiser is compiled
        (2, 3.0, {"compile": "full"}, Layout(1, cfg=2)),
    ],
)
def test_a_layout_for_a_number_of_devices(tiny, devices, guidance, settings, layout):
    choice = chosen(tiny(num_inference_steps=25, max_guidance_scale=guidance), devices, **settings)
    assert choice.layout == layout


def test_a_layout_is_chosen_by_counted_operations(tiny):
    choice = chosen(tiny(num_inference_steps=25), 4)
    assert choice.basis == "counted operations"
    assert [candidate.layout for candidate in choice.candidates] == [Layout(2, cfg=2), Layout(4)]
    half, whole = choice.candidates
    assert 1.8 < whole.exact_ms / half.exact_ms < 2.2
    first, *_, last = choice.describe().splitlines()
    assert first.split()[:4] == ["layout", "s", "a", "sample"]
    assert last == f"layout (by counted operations): {choice.reason}"


def test_a_layout_is_chosen_by_measured_times(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path))
    # a GPU that is as slow with half of the batch as with all of it
    monkeypatch.setattr(costs, "stopwatch_for", lambda device: lambda name, run: (run(), 10**7)[1])
    module = tiny(num_inference_steps=25)
    module.configure_model()
    choice = chosen(module, 4, measures=True)
    assert choice.basis == "measured times"
    assert choice.layout == Layout(4)
    half, whole = choice.candidates
    assert half.exact_ms == whole.exact_ms
    assert len(list((tmp_path / "costs").iterdir())) == 2


def test_a_layout_for_an_unknown_model():
    choice = chosen(VideoPredictor("owner/name"), 4)
    assert choice.layout == Layout(2, cfg=2)
    assert choice.reason == "cfg 2 x 2 stages is taken unseen, since the split of the guidance batch in it is exact."


def test_too_many_devices_for_one_sample(tiny):
    with pytest.raises(ValueError, match=r"finds no layout of 9 ranks for this model .*: start another number of"):
        over(AsyncDiffStrategy(layout="auto"), 9).check_module(tiny())
    over(AsyncDiffStrategy(layout="auto"), 10).check_module(tiny())
    with pytest.raises(ValueError, match="finds no layout of 1 ranks"):
        over(AsyncDiffStrategy(layout="auto", warm_up_mode="relay"), 1).check_module(tiny())


@pytest.mark.parametrize(("devices", "layout"), [(4, Layout(4)), (3, Layout(3))])
def test_a_run_that_goes_on_keeps_its_layout_where_it_fits(tiny, devices, layout):
    strategy = over(AsyncDiffStrategy(layout="auto"), devices)
    strategy.keep({"stages": 4, "stride": 1, "cfg": 1}, None)
    assert strategy.choose(tiny(), (64, 64), False).layout == layout


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"balance": "measured"}, [["a"], ["b"]]),
        ({}, None),
        ({"cut": [["c"], ["d"]]}, [["c"], ["d"]]),
    ],
)
def test_a_run_that_goes_on_keeps_a_measured_cut(settings, cut):
    strategy = AsyncDiffStrategy(stages=2, **settings)
    strategy.keep(None, [["a"], ["b"]])
    assert strategy.cut == cut


def test_a_layout_is_not_known_before_it_is_chosen():
    described = AsyncDiffStrategy(layout="auto").describe()
    assert described["layout"] == "auto"
    assert described["stages"] is described["stride"] is described["cfg"] is None


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny):
    return predict(tiny(), "auto")


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": 1},
        {"stages": 2, "warm_up": 4, "simulate": True},
        {"stages": 3, "warm_up": WarmUp(until_noise=0.0), "simulate": True},
    ],
)
def test_exact_modes_make_the_pictures_of_one_gpu(tiny, plain, settings):
    assert predict(tiny(), AsyncDiffStrategy(**settings)) == plain


def test_stages_make_other_pictures_and_always_the_same(tiny, plain):
    simulated = predict(tiny(), AsyncDiffStrategy(stages=2, warm_up=1, simulate=True))
    assert simulated != plain
    assert predict(tiny(), AsyncDiffStrategy(stages=2, warm_up=1, simulate=True)) == simulated


def test_nothing_is_left_on_the_denoiser(tiny, plain):
    module = tiny()
    strategy = AsyncDiffStrategy(stages=2, warm_up=1, simulate=True)
    predict(module, strategy, images=1)
    assert strategy.handle is None
    assert not any(
        getattr(part, "_diffusers_hook", None) and HookRegistry.check_if_exists_or_initialize(part).hooks
        for part in module.denoiser.modules()
    )
    assert predict(module, "auto") == plain


def test_a_run_that_fails_leaves_nothing_either(tiny, plain, monkeypatch):
    module = tiny()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no frames"):
        patch.setattr(module, "_decode", lambda latents: (_ for _ in ()).throw(RuntimeError("no frames")))
        predict(module, AsyncDiffStrategy(stages=2, warm_up=1, simulate=True))
    assert predict(module, "auto") == plain
