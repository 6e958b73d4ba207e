"""CUDA graphs of steps: the bits of eager steps, what changes between samples, what cannot be recorded, memory.

All ranks in one process. The ranks themselves, over NCCL: ranks.py, by hand.
"""

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from denoisers import NAMES, Sampler, build, ddim

from asyncdiff_pl.parallel import WarmUp, parallelize
from asyncdiff_pl.parallel.capture import CannotCapture, recorder_for
from asyncdiff_pl.parallel.recorded_inputs import StaticInputs
from asyncdiff_pl.parallel.recording_memory import lasting

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:The denoiser's inputs changed"),
]

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_numbers():
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), flags:
        yield


def to_gpu(tree):
    return tree_map(lambda leaf: leaf.to(GPU) if isinstance(leaf, torch.Tensor) else leaf, tree)


def sampler_of(name, **settings):
    sampler = Sampler(name, **settings)
    sampler.latents, sampler.condition, sampler.kwargs = to_gpu((sampler.latents, sampler.condition, sampler.kwargs))
    return sampler


def both(play, denoiser, scheduler, **settings):
    """What `play(handle)` gives without graphs and with them, and how many graphs there were."""
    found = []
    for capture in (False, True):
        handle = parallelize(denoiser, simulate=True, scheduler=scheduler, capture=capture, **settings)
        found.append(play(handle))
        assert handle.capture_refusal == ""
        num_graphs = handle.num_graphs
        handle.remove()
    return *found, num_graphs


def check(play, denoiser, scheduler, **settings):
    expected, found, num_graphs = both(play, denoiser, scheduler, **settings)
    for at, pair in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(*pair), f"sample {at}"
    return num_graphs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_inference", [True, False])
def test_replays_give_the_bits_of_eager_steps(name, is_inference):
    denoiser, scheduler = build(name).to(GPU), ddim()
    samplers = [sampler_of(name, seed=seed) for seed in range(3)]

    def play(handle):
        # `inference_mode(False)` would turn gradients on
        with torch.inference_mode() if is_inference else torch.no_grad():
            return [sampler(denoiser, scheduler, 7).clone() for sampler in samplers]

    assert check(play, denoiser, scheduler, stages=2, warm_up=2) == 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg": 2},
        {"stages": 3, "warm_up": 1, "time_shift": True},
        {"stages": 2, "stride": 2, "cfg": 2, "warm_up": 2},
        {"stages": 4, "warm_up": 1, "refresh_every": 3},
        {"stages": 2, "warm_up": WarmUp(until_drift=0.35), "refresh_every": 3},
    ],
)
def test_all_layouts(settings):
    denoiser, scheduler = build("sd21").to(GPU), ddim()
    samplers = [sampler_of("sd21", seed=seed) for seed in range(3)]
    check(lambda handle: [sampler(denoiser, scheduler, 7) for sampler in samplers], denoiser, scheduler, **settings)


def test_what_changes_between_samples_is_seen():
    """Shapes that take turns, FreeU, autocast, weights in place and replaced."""
    denoiser, scheduler = build("sd15").to(GPU), ddim()
    weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
    one, large, two = sampler_of("sd15"), sampler_of("sd15", size=16), sampler_of("sd15", batch=2)

    def play(handle):
        denoiser.load_state_dict(weights)
        found = [sampler(denoiser, scheduler, 6) for sampler in (one, large, one, two, large, one)]
        denoiser.enable_freeu(0.9, 0.2, 1.5, 1.6)
        found += [one(denoiser, scheduler, 6), one(denoiser, scheduler, 6)]
        denoiser.disable_freeu()
        with torch.autocast("cuda", torch.bfloat16):
            found += [one(denoiser, scheduler, 6), one(denoiser, scheduler, 6)]
            denoiser.conv_in.weight.mul_(1.5)
            found.append(one(denoiser, scheduler, 6))
        denoiser.conv_in.weight = nn.Parameter(denoiser.conv_in.weight * 0.5, requires_grad=False)
        return [*found, one(denoiser, scheduler, 6)]

    check(play, denoiser, scheduler, stages=2, warm_up=2)


@pytest.mark.parametrize("kind", ["on the CPU", "on the GPU", "a number"])
def test_timesteps(kind):
    denoiser, scheduler, sampler = build("sd21").to(GPU), ddim(), sampler_of("sd21")

    def play(handle):
        scheduler.set_timesteps(6)
        latents = sampler.latents
        for t in scheduler.timesteps:
            given = {"on the CPU": t.cpu(), "on the GPU": t.to(GPU), "a number": t.item()}[kind]
            estimate = denoiser(sampler.call(latents), given, **sampler.kwargs, return_dict=False)[0].chunk(2)[0]
            latents = scheduler.step(estimate, t, latents).prev_sample
        return [latents]

    assert check(play, denoiser, scheduler) == 1


def test_a_step_that_waits_for_the_gpu_is_run():
    """And the GPU can be used as before."""
    denoiser, scheduler, sampler = build("sd21").to(GPU), ddim(), sampler_of("sd21")
    expected = sampler(denoiser, scheduler, 5)
    denoiser.mid_block.register_forward_pre_hook(lambda module, args: float(args[0].sum()) and None)
    stream = torch.cuda.current_stream()
    handle = parallelize(denoiser, scheduler=scheduler, capture=True)
    with pytest.warns(UserWarning, match="Steps are not captured, .*: a step could not be recorded"):
        found = sampler(denoiser, scheduler, 5)
    assert torch.equal(found, expected)
    assert torch.cuda.current_stream() == stream
    handle.remove()
    assert torch.equal(sampler(denoiser, scheduler, 5), expected)


def test_other_threads_may_use_the_gpu_meanwhile():
    denoiser, scheduler, sampler = build("sd21").to(GPU), ddim(), sampler_of("sd21")
    expected, stop = sampler(denoiser, scheduler, 5), threading.Event()

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                torch.ones(1000, device=GPU).sum().item()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        handle = parallelize(denoiser, scheduler=scheduler, capture=True)
        found = [sampler(denoiser, scheduler, 5) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert handle.num_graphs == 1
    handle.remove()
    assert all(torch.equal(each, expected) for each in found)


def test_removal_gives_the_memory_back():
    denoiser, scheduler, sampler = build("sd21").to(GPU), ddim(), sampler_of("sd21", size=64)
    sampler(denoiser, scheduler, 2)

    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    held = []
    for _ in range(3):
        handle = parallelize(denoiser, stages=2, warm_up=1, simulate=True, scheduler=scheduler, capture=True)
        for _ in range(2):
            sampler(denoiser, scheduler, 5)
        held.append(reserved())
        handle.remove()
    del handle
    numbers = [round(each / 2**20) for each in (before, *held, reserved())]
    text = f"MiB reserved before, with each handle, and after: {numbers}"
    assert held[0] > before + 2**22, text
    # cuBLAS keeps a workspace for the stream that is recorded on
    assert numbers[-1] < numbers[0] + 64, text
    assert numbers[3] < numbers[1] + 16, text


# -- the recorder by itself ----------------------------------------------------------------------------------------


def test_recordings_can_be_made_after_all_were_dropped():
    recorder = recorder_for(GPU, None)
    inputs = StaticInputs([torch.ones(1000)], GPU)
    for factor in (2, 3):
        recording, result = recorder.record(lambda factor=factor: inputs.given[0] * factor)
        inputs.load([torch.full((1000,), float(factor))])
        recording.replay()
        assert result.tolist() == [float(factor * factor)] * 1000
        # what a replay wrote is in use while it is dropped
        recording.drop()


def test_recordings_share_their_memory():
    recorder = recorder_for(GPU, None)
    given = torch.ones(2**24, device=GPU)

    def large():
        return ((given + 1) * 2 + 3).sum()

    large()
    recordings = [recorder.record(large)]
    once = torch.cuda.memory_reserved()
    recordings += [recorder.record(large) for _ in range(5)]
    assert torch.cuda.memory_reserved() < once + 2**25
    for recording, _ in recordings:
        recording.drop()


def recorded_sum(given):
    """A recorder with the recording of a large step in its memory."""
    recorder = recorder_for(GPU, None)

    def large():
        return ((given + 1) * 2 + 3).sum()

    expected, _ = recorder.rehearse(large, torch.clone)
    recording, found = recorder.record(large)
    return recorder, recording, large, expected, found


def test_a_rehearsal_takes_no_memory_of_its_own():
    recorder, recording, large, expected, found = recorded_sum(torch.ones(2**26, device=GPU))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    again, is_clean = recorder.rehearse(large, torch.clone)
    assert torch.cuda.max_memory_reserved() < before + 2**25
    assert is_clean
    recording.replay()
    assert again.item() == expected.item() == found.item()
    recording.drop()


def test_what_lasts_is_not_written_over():
    given = torch.ones(2**22, device=GPU)
    recorder, recording, _, expected, found = recorded_sum(given)

    def keeps():
        with lasting():
            place = torch.empty_like(given)
        return place.copy_(given + 4)

    kept = []
    _, is_clean = recorder.rehearse(lambda: kept.append(keeps()), lambda nothing: nothing)
    assert is_clean
    recording.replay()
    assert found.item() == expected.item()
    assert kept[0].eq(5).all()
    recording.drop()


def test_recordings_that_would_write_over_what_is_in_use_are_not_sound():
    given = torch.ones(2**22, device=GPU)
    recorder, recording, large, expected, _ = recorded_sum(given)
    kept = []
    _, is_clean = recorder.rehearse(lambda: kept.append(given + 4), lambda nothing: nothing)
    assert not is_clean
    recorder.begin_anew()
    assert not recording.is_sound
    recording.drop()
    new, found = recorder.record(large)
    assert new.is_sound
    new.replay()
    assert found.item() == expected.item()
    assert kept[0].eq(5).all()
    new.drop()


def test_why_something_could_not_be_recorded():
    recorder = recorder_for(GPU, None)
    with pytest.raises(CannotCapture, match="a step could not be recorded"):
        recorder.record(lambda: torch.ones(1, device=GPU).item())
    assert torch.ones(3, device=GPU).sum().item() == 3
    # random numbers, and recordings of their own
    assert torch.randn(3, device=GPU).isfinite().all()
    recording, result = recorder_for(GPU, None).record(lambda: torch.ones(3, device=GPU).sum())
    recording.replay()
    assert result.item() == 3
