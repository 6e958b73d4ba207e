"""What is foreseen of layouts: bytes that runs count, ideal speed-ups of the original's cuts, buffers that are held."""

import functools

import pytest
import torch
from cuts import ORIGINAL
from denoisers import build, build_full, ddim, full_call
from patch_scenarios import tall

from asyncdiff_pl.parallel import Layout, parallelize
from asyncdiff_pl.parallel.foreseen import LINKS, Foreseen, Link, Spent, Terms, layout_name
from asyncdiff_pl.parallel.planning import Planner, layouts_for
from asyncdiff_pl.parallel.stages.units import meta_twin

STEPS = 4
"""Of a sample: an exact one, two after which others follow, and the last one, in which nothing is sent."""
ROWS = 16

denoiser_of = functools.cache(build)


@functools.cache
def traced(name, dtype):
    sampler = tall(name, ROWS, dtype)
    twin = torch.nn.Module.to(meta_twin(denoiser_of(name)), dtype)
    args = sampler.call(sampler.latents), torch.tensor(7)
    return Planner(twin, args, sampler.kwargs | {"return_dict": False}, Terms(((STEPS, 1),)))


def planner(name, mode="corrected_async_gn", portion=1.0, dtype=torch.float32):
    found = traced(name, dtype)
    found.terms = Terms(((STEPS, 1),), mode=mode, portion=portion, patch_warm_up=1, steps_warm_up=1)
    return found


def counted(name, layout, dtype=torch.float32, **settings):
    """Bytes of a step after warm-up, and buffers, as a run counts them in which one process plays all ranks."""
    denoiser, scheduler = denoiser_of(name), ddim()
    if dtype != torch.float32:
        denoiser = torch.nn.Module.to(build(name), dtype)
    axes = {axis: getattr(layout, axis) for axis in ("stages", "stride", "cfg", "patches", "steps")}
    handle = parallelize(denoiser, **axes, **settings, warm_up=1, simulate=True, scheduler=scheduler)
    tall(name, ROWS, dtype)(denoiser, scheduler, STEPS)
    pipeline = handle._pipeline
    found = handle.bytes_per_step, handle.sent_bytes, getattr(pipeline, "held_bytes", None)
    handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "layout"),
    [("sd21", Layout(3)), ("sd21", Layout(2, 2, cfg=2)), ("svd", Layout(2))],
)
def test_bytes_of_stages(name, layout):
    (found,) = planner(name).foresee(layout)
    in_a_round, in_all, _ = counted(name, layout)
    # of one half of the guidance batch
    assert found.sent_bytes == layout.cfg * in_a_round // layout.stride
    rounds_that_send = 2 if layout.stride == 1 else 1
    assert in_all == layout.cfg * rounds_that_send * in_a_round > 0


@pytest.mark.parametrize(
    ("name", "layout", "mode", "portion"),
    [
        ("sdxl", Layout(patches=3), "full_sync", 1.0),
        ("sdxl", Layout(patches=3), "stale_gn", 0.3),
        ("sd21", Layout(patches=2), "separate_gn", 1.0),
        ("sd21", Layout(patches=2, cfg=2), "no_sync", 0.3),
        ("sd21", Layout(patches=2), "naive", 1.0),
        ("svd", Layout(patches=2), "corrected_async_gn", 0.3),
        ("sd21", Layout(patches=2), "sync_gn", 0.0),
    ],
)
def test_bytes_and_buffers_of_patches(name, layout, mode, portion):
    exact, *others = planner(name, mode, portion).foresee(layout)
    found = next((each for each in others), exact)
    assert (exact.mode, found.mode) == ("full_sync", mode)
    sent, in_all, held = counted(name, layout, mode=mode, portion=portion)
    assert found.sent_bytes == sent
    if mode in ("corrected_async_gn", "stale_gn"):
        assert in_all == exact.sent_bytes + 2 * sent
    # buffers of the patch that holds most; all of them hold what the run does
    assert held <= layout.pipeline_ranks * found.held_bytes <= 2 * held


def test_moments_travel_in_single_precision():
    (found, _) = planner("sd21", dtype=torch.bfloat16).foresee(Layout(patches=2))
    assert found.sent_bytes == counted("sd21", Layout(patches=2), torch.bfloat16)[0]


@pytest.mark.parametrize("layout", [Layout(steps=2), Layout(steps=3, cfg=2)], ids=layout_name)
def test_bytes_of_steps_at_a_time(layout):
    (found,) = planner("sd21").foresee(layout)
    assert found.sent_bytes == counted("sd21", layout)[0] > 0


def test_estimates_come_on_top():
    """A picture of 4 x 16 x 8 numbers, two with guidance."""
    estimate = 2 * 4 * ROWS * 8 * 4
    (halves,) = planner("sd21").foresee(Layout(cfg=2))
    assert (halves.sent_bytes, halves.estimate_bytes, halves.waited_for_bytes) == (0, estimate, estimate // 2)
    (stages,) = planner("sd21").foresee(Layout(3))
    assert (stages.estimate_bytes, stages.waited_for_bytes) == (2 * estimate, estimate)
    (exact, _) = planner("sd21").foresee(Layout(patches=2))
    assert exact.estimate_bytes == estimate


# 1 / the slowest stage's share of the operations, by FLOPs of the original's cuts: notes of asyncdiff.md
IDEAL = {
    "sd15": (1.79, 2.62, 3.19),
    "sd21": (1.90, 2.60, 3.64),
    "sdxl": (1.78, 2.87, 3.45),
    "svd": (1.81, 2.49, 2.86),
    "animatediff": (1.75, 2.28),
}


@functools.cache
def full_planner(name):
    args, kwargs = full_call(name)
    # so many steps that warm-up does not count
    return Planner(build_full(name), args, kwargs, Terms(((10**4, 1),)))


@pytest.mark.parametrize(
    ("name", "stages", "ideal"),
    [(name, at + 2, ideal) for name, found in IDEAL.items() for at, ideal in enumerate(found)],
)
def test_ideal_speed_ups_of_the_originals_cuts(name, stages, ideal):
    planner = full_planner(name)
    planner.terms = Terms(((10**4, 1),), cut=ORIGINAL[name, stages])
    (found,) = planner.foresee(Layout(stages))
    assert found.speed_up == pytest.approx(ideal, rel=0.01)
    # what is found is at least as even
    planner.terms = Terms(((10**4, 1),))
    assert planner.foresee(Layout(stages))[0].speed_up >= found.speed_up


def test_exact_steps_are_in_the_speed_up():
    """SVD-XT's shares with 3 exact steps of 25: 25 / (3 + 22 / 1.81)."""
    planner = full_planner("svd")
    planner.terms = Terms(((25, 3),), cut=ORIGINAL["svd", 2])
    assert planner.foresee(Layout(2))[0].speed_up == pytest.approx(25 / (3 + 22 / 1.81), rel=0.01)
    planner.terms = Terms(((25, 3),), refresh_every=4, cut=ORIGINAL["svd", 2])
    # steps 6, 10, 14, 18, 22 too
    assert planner.foresee(Layout(2))[0].speed_up == pytest.approx(25 / (8 + 17 / 1.81), rel=0.01)
    # 11 rounds of two
    assert planner.foresee(Layout(steps=2))[0].speed_up == pytest.approx(25 / (3 + 11))
    # 40 + 32 rows of 72
    assert planner.foresee(Layout(patches=2))[0].speed_up == pytest.approx(72 / 40)
    assert planner.foresee(Layout(cfg=2))[0].speed_up == pytest.approx(2)


def test_weights_and_ages():
    planner = full_planner("svd")
    planner.terms = Terms(((25, 3),), cut=ORIGINAL["svd", 2])
    (found,) = planner.foresee(Layout(2))
    weights = sum(weight.numel() for weight in build_full("svd").parameters())
    assert found.weight_bytes == 2 * weights
    assert weights < found.relay_bytes < 2 * weights
    assert (found.oldest, found.boundaries) == (1, 1)
    (twice,) = planner.foresee(Layout(2, 2))
    assert (twice.oldest, twice.boundaries, twice.mean_age) == (2, 1, 2 * found.mean_age)


@pytest.mark.parametrize(
    ("ranks", "is_guided", "expected"),
    [
        (2, True, [Layout(cfg=2), Layout(2), Layout(patches=2), Layout(steps=2)]),
        (2, None, [Layout(2), Layout(patches=2), Layout(steps=2)]),
        (3, True, [Layout(3), Layout(2, 2), Layout(patches=3), Layout(steps=3)]),
        (9, False, [Layout(8, 2), Layout(patches=9), Layout(steps=9)]),
    ],
)
def test_layouts_of_some_ranks(ranks, is_guided, expected):
    assert layouts_for(ranks, is_guided) == expected
    assert all(layout.pipeline_ranks == ranks for layout in layouts_for(ranks, is_guided))


@pytest.mark.parametrize(
    ("beside", "is_hidden", "speed_up"),
    # 4 exact steps of 10 ms, 6 of 5 ms, in each of them 1 ms of waiting
    [(0, None, 100 / (4 * 11 + 6 * 6)), (5_000_000, True, 100 / (4 * 11 + 6 * 6)), (10_000_000, False, 1.0)],
)
def test_what_a_link_makes_of_bytes(beside, is_hidden, speed_up):
    link = Link(waited_for=1e9, beside=1e9)
    if beside == 10_000_000:
        # what comes in takes as long as a whole step
        speed_up = 100 / (4 * 11 + 6 * 11)
    each = {"beside_bytes": beside, "waited_for_bytes": 10**6, "waited_for_in_exact": 10**6}
    found = Foreseen(Layout(2), "", (0.5, 0.5), (Spent(10, 4, 4.0, 3.0),), 0, **each)
    assert found.speed_up == pytest.approx(10 / 7)
    assert found.is_hidden(link, 10.0) is is_hidden
    assert found.speed_up_on(link, 10.0) == pytest.approx(speed_up)
    assert found.link_ms(link) == pytest.approx(1 + beside / 1e6)


def test_transformers_have_no_patches():
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        twin = DiTTransformer2DModel(2, 8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
        inputs = torch.empty(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    planner = Planner(twin, inputs, {}, Terms(((25, 3),)))
    with pytest.raises(ValueError, match=r"patches are for the UNets .* the denoiser is a DiTTransformer2DModel"):
        planner.foresee(Layout(patches=2))
    assert planner.foresee(Layout(2))[0].sent_bytes > 0


def test_known_links_are_slower_beside_a_computation():
    assert all(link.beside <= link.waited_for for link in LINKS.values())
