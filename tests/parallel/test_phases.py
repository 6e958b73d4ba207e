"""Steps that are replayed give the bits of steps that are run, and what changes between samples is seen.

Recordings on the CPU (fake_graph.py): GPU's are in tests/gpu. The ranks themselves: test_ranks.py.
"""

import pytest
import torch
from denoisers import NAMES, Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import WarmUp, parallelize, recordings

pytestmark = [
    # schedulers in NumPy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # guidance that ends
    pytest.mark.filterwarnings("ignore:The denoiser's inputs changed"),
    pytest.mark.filterwarnings("error:Steps are not captured"),
]

STEPS = 6
LAYOUTS = [
    {},
    {"cfg": 2},
    {"stages": 3, "warm_up": 1, "time_shift": True},
    {"stages": 2, "stride": 2, "warm_up": 2},
    {"stages": 2, "stride": 2, "cfg": 2, "warm_up": 1},
    {"stages": 4, "warm_up": 1, "refresh_every": 3},
    {"stages": 2, "warm_up": WarmUp(until_drift=0.35)},
]

PATCHES = [
    {"patches": 2, "mode": "full_sync"},
    {"patches": 2, "mode": "corrected_async_gn", "portion": 0.3, "warm_up": 2},
    {"patches": 2, "cfg": 2, "mode": "stale_gn", "warm_up": 1},
]


def both(play, pipe, scheduler=None, **settings):
    """What `play(handle)` gives without recordings and with them, and the recorder."""
    handle = parallelize(pipe, simulate=True, scheduler=scheduler, **settings)
    expected, sent = play(handle), handle.sent_bytes
    handle.remove()
    with captured(FakeRecorder()) as recorder:
        handle = parallelize(pipe, simulate=True, scheduler=scheduler, capture=True, **settings)
        found = play(handle)
        assert handle.sent_bytes == sent
        recorder.recorded = handle.num_graphs
        handle.remove()
    assert recorder.alive == 0
    return found, expected, recorder


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def check_samples(name, settings, samples=2):
    denoiser, scheduler = build(name), ddim()
    size = {"size": 16} if "patches" in settings else {}
    samplers = [Sampler(name, seed=seed, **size) for seed in range(samples)]

    def play(handle):
        return [sampler(denoiser, scheduler, STEPS) for sampler in samplers]

    found, expected, recorder = both(play, denoiser, scheduler, **settings)
    assert same(found, expected)
    return recorder


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sd21"])
def test_replays_give_the_same_bits(name):
    recorder = check_samples(name, {"stages": 2, "warm_up": 2})
    # an exact step, one that fills the buffers, two that read one of the two buffers each, and the last
    assert recorder.recorded == 5
    assert recorder.replays == 2 * STEPS - 5


@pytest.mark.parametrize("settings", LAYOUTS + PATCHES)
def test_all_layouts(settings):
    recorder = check_samples("sd21", settings)
    assert recorder.recorded <= 6
    # all kinds of steps but the first are met in the memory of recordings, and written over there
    assert recorder.rehearsals == recorder.recorded - 1


def test_recordings_that_would_write_over_what_is_in_use_are_made_again():
    denoiser, scheduler = build("sd21"), ddim()
    samplers = [Sampler("sd21", seed=seed) for seed in range(3)]
    settings = {"stages": 2, "warm_up": 2, "simulate": True, "scheduler": scheduler}
    handle = parallelize(denoiser, **settings)
    expected = [sampler(denoiser, scheduler, STEPS) for sampler in samplers]
    handle.remove()
    found, counts = [], []
    with captured(FakeRecorder()) as recorder:
        recorder.unclean = 2
        handle = parallelize(denoiser, capture=True, **settings)
        for sampler in samplers:
            found.append(sampler(denoiser, scheduler, STEPS))
            counts.append(handle.num_graphs)
        handle.remove()
    assert same(found, expected)
    # two kinds of steps were recorded before the one that left something behind
    assert counts == [5, 7, 7]
    assert recorder.alive == 0


@pytest.mark.parametrize(
    ("name", "settings", "graphs"),
    [
        ("controlnet", {"stages": 2}, 5),
        # two denoiser calls a step
        ("flux_true_cfg", {"stages": 2}, 10),
        ("sd3_skips_layers", {"cfg": 2}, 2),
        # half the batch from the middle of each sample on
        ("sd15_guidance_ends", {"stages": 2}, 6),
        ("sd15_guidance_ends", {"cfg": 2, "stages": 2}, 6),
        ("sd15_heun", {"stages": 2}, 5),
    ],
)
def test_pipelines(name, settings, graphs):
    sample = Sample(name)
    found, expected, recorder = both(lambda handle: [sample() for _ in range(2)], sample.pipe, warm_up=2, **settings)
    assert same(found, expected)
    # the second sample is all replays
    assert recorder.recorded == graphs


def scale_of_lora(pipe, scale):
    pipe.set_adapters("default_0", scale)


def scale_of_ip_adapter(pipe, scale):
    pipe.set_ip_adapter_scale(scale)


def scale_of_free_u(pipe, scale):
    pipe.enable_freeu(scale, 0.2, 1.5, 1.6) if scale else pipe.disable_freeu()


def weights_in_place(pipe, scale):
    pipe.unet.conv_in.weight.mul_(0.5 + scale)


def other_weights(pipe, scale):
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight * (0.5 + scale), requires_grad=False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(
            "sd15_lora", scale_of_lora, marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('peft')")
        ),
        ("sd15_ip_adapter", scale_of_ip_adapter),
        ("sd15", scale_of_free_u),
        ("sd15", weights_in_place),
        ("sd15", other_weights),
    ],
)
def test_a_changed_network_is_seen_by_the_next_sample(name, change):
    sample = Sample(name)
    weights = {key: value.clone() for key, value in sample.pipe.unet.state_dict().items()}

    def play(handle):
        sample.pipe.unet.load_state_dict(weights)
        found = []
        for scale in (1.0, 0.0, 1.0):
            change(sample.pipe, scale)
            found.append(sample())
        return found

    found, expected, recorder = both(play, sample.pipe, stages=2, warm_up=2)
    assert same(found, expected)
    assert not torch.equal(found[0], found[1])
    assert recorder.replays > 0


def test_a_changed_network_goes_unseen_without_the_fingerprint(monkeypatch):
    """So the recordings here freeze what graphs freeze."""
    monkeypatch.setattr(recordings, "fingerprint", lambda network: 0)
    sample = Sample("sd15_ip_adapter")

    def play(handle):
        scale_of_ip_adapter(sample.pipe, 1.0)
        first = sample()
        scale_of_ip_adapter(sample.pipe, 0.0)
        return [first, sample()]

    found, expected, _ = both(play, sample.pipe, stages=2, warm_up=2)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


def samplers_of_all_shapes():
    longer = Sampler("sd21", seed=6)
    longer.kwargs["encoder_hidden_states"] = torch.cat([longer.kwargs["encoder_hidden_states"]] * 2, 1)
    return [Sampler("sd21"), Sampler("sd21", size=16), longer, Sampler("sd21", batch=2)]


def test_other_shapes_are_seen_and_two_of_them_kept():
    denoiser, scheduler = build("sd21"), ddim()
    one, large, longer, two = samplers_of_all_shapes()

    def play(handle):
        return [sampler(denoiser, scheduler, 5) for sampler in (one, large, longer, two, one, two, one)]

    found, expected, recorder = both(play, denoiser, scheduler, stages=2, warm_up=2)
    assert same(found, expected)
    # the first four and one that had not been used for longest
    assert (recorder.recorded, recorder.replays) == (5 * 5, 2 * 5)


def test_other_modes_are_seen():
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")

    def play(handle):
        found = [sampler(denoiser, scheduler, 4)]
        with torch.autocast("cpu", torch.bfloat16):
            found += [sampler(denoiser, scheduler, 4), sampler(denoiser, scheduler, 4)]
        with torch.inference_mode():
            found.append(sampler(denoiser, scheduler, 4).clone())
        return [*found, sampler(denoiser, scheduler, 4)]

    found, expected, _ = both(play, denoiser, scheduler, stages=2, warm_up=1)
    assert same(found, expected)


def test_weights_cast_by_autocast_are_not_those_of_the_recording():
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}

    def play(handle):
        denoiser.load_state_dict(weights)
        with torch.autocast("cpu", torch.bfloat16):
            first = sampler(denoiser, scheduler, 4)
            denoiser.conv_in.weight.mul_(1.5)
            return [first, sampler(denoiser, scheduler, 4)]

    found, expected, _ = both(play, denoiser, scheduler)
    assert same(found, expected)
    assert not torch.equal(*found)


def test_samples_that_were_broken_off_leave_no_trace():
    denoiser, scheduler, sampler, other = build("sd21"), ddim(), Sampler("sd21"), Sampler("sd21", seed=6)

    def play(handle):
        found = []
        for stop in (1, 4, 5):
            other(denoiser, scheduler, 9, stop=stop)
            found.append(sampler(denoiser, scheduler, 6))
        other(denoiser, scheduler, 9, stop=5)
        handle.reset()
        return [*found, sampler(denoiser, scheduler, 6)]

    found, expected, _ = both(play, denoiser, scheduler, stages=2, warm_up=2)
    assert same(found, expected)


@pytest.mark.parametrize("number", [int, float])
def test_a_timestep_may_be_a_number(number):
    denoiser, sampler = build("sd21"), Sampler("sd21")
    scheduler = ddim()

    def play(handle):
        scheduler.set_timesteps(5)
        found, latents = [], sampler.latents
        for t in scheduler.timesteps:
            given = number(t) + (0.5 if number is float else 0)
            estimate = denoiser(sampler.call(latents), given, **sampler.kwargs, return_dict=False)[0].chunk(2)[0]
            latents = scheduler.step(estimate, t, latents).prev_sample
            found.append(latents)
        return found

    found, expected, recorder = both(play, denoiser, scheduler)
    assert same(found, expected)
    assert recorder.recorded == 1


def test_results_are_not_overwritten_by_the_next_step():
    """PNDM keeps the estimates of four steps."""
    denoiser, scheduler, sampler = build("sd21"), ddim(), Sampler("sd21")

    def play(handle):
        scheduler.set_timesteps(6)
        found, latents = [], sampler.latents
        for t in scheduler.timesteps:
            found.append(denoiser(sampler.call(latents), t, **sampler.kwargs, return_dict=False)[0])
            latents = scheduler.step(found[-1].chunk(2)[0], t, latents).prev_sample
        return found

    found, expected, _ = both(play, denoiser, scheduler)
    assert same(found, expected)


# -- refusals ------------------------------------------------------------------------------------------------------


def refusal(settings, sampler, denoiser, play=None):
    """The warning of a run that goes on without recordings, to the same bits."""
    scheduler = ddim()
    play = play or (lambda: [sampler(denoiser, scheduler, 6) for _ in range(2)])
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    expected = play()
    handle.remove()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=True, **settings)
    with pytest.warns(UserWarning, match="Steps are not captured") as warned:
        found = play()
    assert len(warned) == 1
    assert same(found, expected)
    assert str(warned[0].message) == f"Steps are not captured, and run without CUDA graphs: {handle.capture_refusal}."
    handle.remove()
    return handle.capture_refusal


def test_a_cpu_has_no_graphs():
    assert "needs an NVIDIA GPU, and the denoiser is on cpu" in refusal({"stages": 2}, Sampler("sd21"), build("sd21"))


def test_random_numbers_are_not_recorded():
    denoiser, sampler = build("sd21"), Sampler("sd21")
    denoiser.mid_block.resnets[0].dropout.p = 0.0001
    denoiser.mid_block.resnets[0].dropout.train()

    def seeded():
        torch.manual_seed(0)
        return [sampler(denoiser, ddim(), 6)]

    with captured(FakeRecorder()) as recorder:
        told = refusal({}, sampler, denoiser, seeded)
    assert "mid_block.resnets.0.dropout drops out values at random" in told
    assert recorder.replays == 0


def test_a_number_that_changes_in_each_step_is_named():
    denoiser, sampler = build("sd21"), Sampler("sd21")
    scales = iter(range(1, 1000))

    def more(step):
        return {"cross_attention_kwargs": {"scale": 1 / next(scales)}}

    with captured(FakeRecorder()) as recorder, pytest.warns(UserWarning, match="not captured") as warned:
        scheduler = ddim()
        handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=True)
        sampler(denoiser, scheduler, 6, more)
        handle.remove()
    told = [str(each.message) for each in warned if "captured" in str(each.message)]
    assert len(told) == 1
    assert "the denoiser's cross_attention_kwargs['scale'] changes from step to step" in told[0]
    assert recorder.alive == 0


def test_a_step_that_cannot_be_recorded_is_run():
    """In mid-sample, by one that synchronises."""
    denoiser, sampler = build("sd21"), Sampler("sd21")
    denoiser.conv_in.register_forward_pre_hook(lambda module, args: float(args[0].sum()) and None)
    with captured(FakeRecorder()) as recorder:
        told = refusal({"stages": 2, "warm_up": 1}, sampler, denoiser)
    assert "makes the CPU wait" in told
    assert recorder.alive == 0
