"""What patches send and hold: bytes from shapes alone, and who sends to whom."""

import contextlib
import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from denoisers import build, ddim
from patch_scenarios import tall
from torch import nn

from asyncdiff_pl.parallel import Layout
from asyncdiff_pl.parallel.patches import traffic
from asyncdiff_pl.parallel.patches.pipeline import PatchPipeline
from asyncdiff_pl.parallel.patches.settings import PatchSettings
from asyncdiff_pl.parallel.patches.swap import LocalSwap
from asyncdiff_pl.parallel.patches.traffic import Traffic
from asyncdiff_pl.parallel.trajectory import Trajectory

FLOAT = 4

denoiser_of = functools.cache(build)


@dataclass
class Expected:
    """Bytes that all patches together send in one step, by kind of layer."""

    halos: int = 0
    moments: int = 0
    tokens: int = 0


@functools.cache
def expected(name: str, shares: tuple[int, ...], portion: float) -> Expected:
    """From the shapes that the layers of the plain denoiser are given."""
    denoiser, found, hooks = denoiser_of(name), Expected(), []
    patches, total = len(shares), sum(shares)
    sampler = tall(name, total)
    columns = sampler.latents.shape[-1]

    def convolution(module, args):
        batch, channels, _, width = args[0].shape
        # stride 1 reads a row above and one below, stride 2 the one above
        rows = 2 if module.stride[0] == 1 else 1
        found.halos += (patches - 1) * rows * batch * channels * width * FLOAT

    def group_norm(module, args):
        found.moments += patches * (patches - 1) * 2 * args[0].shape[0] * module.num_groups * FLOAT

    def attention(module, args):
        batch, tokens, _ = args[0].shape
        level = round((total * columns / tokens) ** 0.5)
        sizes = [share // level for share in shares]
        if portion == 1:
            seen = sum(sum(sizes) - own for own in sizes)
        else:
            seen = sum(
                round(portion * sizes[at]) for own in range(patches) for at in (own - 1, own + 1) if 0 <= at < patches
            )
        channels = module.to_k.out_features + module.to_v.out_features
        found.tokens += seen * (columns // level) * batch * channels * FLOAT

    for path, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3:
            hooks.append(module.register_forward_pre_hook(convolution))
        elif isinstance(module, nn.GroupNorm):
            hooks.append(module.register_forward_pre_hook(group_norm))
        elif path.endswith(".attn1") and "temporal" not in path and "motion" not in path:
            hooks.append(module.register_forward_pre_hook(attention))
    sampler(denoiser, ddim(), 1)
    for hook in hooks:
        hook.remove()
    return found


@contextlib.contextmanager
def sampled(name: str, shares: tuple[int, ...], mode: str, portion: float = 1.0):
    """Patches after a sample of one synchronous step and two others."""
    denoiser, scheduler = denoiser_of(name), ddim()
    trajectory = Trajectory(denoiser, lambda: scheduler)
    settings = PatchSettings(Layout(patches=len(shares)), mode, warm_up=1, portion=portion)
    pipeline = PatchPipeline(denoiser, trajectory, settings)
    tall(name, sum(shares))(denoiser, scheduler, 3)
    try:
        yield pipeline
    finally:
        pipeline.remove()
        trajectory.remove()


CASES = [("sdxl", (8, 4)), ("sd21", (8, 8, 8)), ("svd", (16, 8)), ("animatediff", (8, 8))]


@pytest.mark.parametrize(("name", "shares"), CASES)
@pytest.mark.parametrize("portion", [0, 0.3, 1])
def test_bytes_of_a_step_follow_from_shapes(name, shares, portion):
    each = expected(name, shares, portion)
    with sampled(name, shares, "corrected_async_gn", portion) as pipeline:
        assert pipeline.bytes_per_step == each.halos + each.moments + each.tokens
        whole = expected(name, shares, 1)
        # a synchronous step is exact, whatever the portion; after the last step nobody reads anything
        assert pipeline.sent_bytes == whole.halos + whole.moments + whole.tokens + pipeline.bytes_per_step
    assert (each.tokens == 0) == (portion == 0)


def test_bytes_fall_with_the_portion():
    found = []
    for portion in (0, 0.1, 0.3, 0.5, 1):
        with sampled("sdxl", (12, 12), "stale_gn", portion) as pipeline:
            found.append(pipeline.bytes_per_step)
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("mode", "sends"),
    [
        ("stale_gn", ("halos", "moments", "tokens")),
        ("sync_gn", ("halos", "moments", "tokens")),
        ("separate_gn", ("halos", "tokens")),
        ("no_sync", ()),
        ("naive", ()),
    ],
)
def test_bytes_of_a_mode(mode, sends):
    each = expected("sdxl", (8, 4), 1)
    with sampled("sdxl", (8, 4), mode) as pipeline:
        assert pipeline.bytes_per_step == sum(getattr(each, kind) for kind in sends)


@pytest.mark.parametrize(
    ("mode", "portion", "buffers", "kinds"),
    [
        ("full_sync", 1, 0, ()),
        ("naive", 1, 0, ()),
        ("corrected_async_gn", 1, 2, ("halos", "moments", "tokens")),
        ("stale_gn", 0.3, 2, ("halos", "moments", "tokens")),
        ("sync_gn", 0.3, 2, ("halos", "tokens")),
        ("separate_gn", 0, 2, ("halos",)),
        ("no_sync", 0.3, 1, ("halos", "tokens")),
    ],
)
def test_what_is_held(mode, portion, buffers, kinds):
    """At most twice what is read of other patches in a step, and nothing that nobody reads."""
    each = expected("sdxl", (8, 4), portion)
    with sampled("sdxl", (8, 4), mode, portion) as pipeline:
        assert pipeline.held_bytes == buffers * sum(getattr(each, kind) for kind in kinds)
        pipeline.reset()
        assert pipeline.held_bytes == 0


@pytest.mark.parametrize(("portion", "furthest"), [(0.3, 1), (1, 3)])
def test_who_sends_to_whom(monkeypatch, portion, furthest):
    """Of four patches: halos to neighbours, moments to all, keys and values to neighbours or to all."""
    distances: dict[str, set[int]] = {"halos": set(), "moments": set(), "tokens": set()}
    norms = {path for path, module in denoiser_of("sdxl").named_modules() if isinstance(module, nn.GroupNorm)}
    later = Traffic.later

    def watched(traffic, name, sends, *args, **kwargs):
        kind = "moments" if name in norms else "tokens" if name.endswith("attn1") else "halos"
        distances[kind] |= {abs(patch - other) for patch, parcel in enumerate(sends) for other in parcel}
        later(traffic, name, sends, *args, **kwargs)

    monkeypatch.setattr(Traffic, "later", watched)
    with sampled("sdxl", (4, 4, 4, 4), "corrected_async_gn", portion):
        pass
    assert distances == {"halos": {1}, "moments": {1, 2, 3}, "tokens": set(range(1, furthest + 1))}


def test_what_nobody_waits_for_travels_together(monkeypatch):
    posted, post = [], LocalSwap.post

    def watched(swap, parcels, what, is_waited_for):
        posted.append(is_waited_for)
        return post(swap, parcels, what, is_waited_for)

    monkeypatch.setattr(LocalSwap, "post", watched)
    with sampled("sdxl", (8, 8), "corrected_async_gn"):
        # tiny tensors: all of a step in one; after the last step nobody reads anything
        assert posted.count(False) == 1
    posted.clear()
    monkeypatch.setattr(traffic, "BATCH_BYTES", 50_000)
    with sampled("sdxl", (8, 8), "corrected_async_gn") as pipeline:
        assert posted.count(False) == pytest.approx(pipeline.bytes_per_step / 50_000, rel=0.3)


def test_what_was_sent_is_given_back():
    """Messages that take their time: all that is held of them after many steps is what the last two sent."""

    class Slow:
        sent_bytes = 0

        def post(self, parcels, what, is_waited_for):
            return [] if is_waited_for else [SimpleNamespace(wait=lambda: None)]

    held, alive, steps = Traffic(Slow()), [], 6
    held.keep("layer", [{1: torch.zeros(4)}])
    held.turn_over()
    for _ in range(steps):
        held.before("layer")
        sent = torch.ones(4)
        alive.append(weakref.ref(sent))
        held.later("layer", [{1: sent}])
        del sent
        held.post()
        held.turn_over()
    assert [reference() is not None for reference in alive] == [False] * (steps - 1) + [True]


def test_layers_of_one_shape_share_the_memory_of_messages_that_are_waited_for():
    traffic, keys = Traffic(LocalSwap()), torch.zeros(2, 8, 4, 16)
    before = traffic.held
    one = traffic.room("keys", keys, 4)
    # a recording that was made without it must be made anew
    assert one.shape == (2, 4, 4, 16) and traffic.held is not before
    before = traffic.held
    assert traffic.room("keys", keys, 4) is one and traffic.held is before
    others = [traffic.room("values", keys, 4), traffic.room("keys", keys, 2), traffic.room("keys", keys.half(), 4)]
    assert len({each.data_ptr() for each in (one, *others)}) == 4
    traffic.drop()
    assert traffic.room("keys", keys, 4) is not one
