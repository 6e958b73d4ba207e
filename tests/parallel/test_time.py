"""Parallel in time in one process that plays all ranks: what it computes.

The ranks themselves: test_time_ranks.py. What is refused: test_time_refusals.py.
"""

import functools

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from time_samples import solved
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import TimeParallel, parallelize
from asyncdiff_pl.parallel.time.evaluation import rounded_up
from asyncdiff_pl.parallel.time.settings import share_sizes

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:There are modules"
)

denoiser_of = functools.cache(build)
pipeline_of = functools.cache(Sample)


@functools.cache
def exact(name):
    return pipeline_of(name)()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


# -- what is computed -------------------------------------------------------------------------------------------------

KINDS = ["img2img", "upscale", "sdxl", "sdxl_inpaint", "animatediff", "sd15_ip_adapter", "dit", "sd15_of_three"]


@pytest.mark.parametrize("name", KINDS)
def test_without_tolerance_it_is_one_step_after_the_other(name):
    found, told = solved(pipeline_of(name), tolerance=0.0, ranks=3)
    assert distance(found, exact(name)) < 1e-5
    # each iteration finishes a state; steps that image to image leaves out are not there
    number = told.trajectory.shape[1] - 1
    assert told.iterations == [number - 1] * pipeline_of(name).case.batch
    assert set(told.denoiser_calls) == {1 + number * (number - 1) // 2}
    assert not any(told.unfinished)


@pytest.mark.parametrize("settings", [{"order": 1, "memory": 1}, {"window": 3}, {"method": "picard", "batch": 3}])
def test_so_it_is_with_all_settings(settings):
    found, told = solved(pipeline_of("sd15"), tolerance=0.0, **settings)
    assert distance(found, exact("sd15")) < 1e-5
    assert told.denoiser_calls == [1 + 3 + 3 + 3 + 2 + 1 if "window" in settings else 1 + 15]


@pytest.mark.parametrize("name", ["sd15_of_three", "dit_of_three"])
@pytest.mark.parametrize("kind", ["ddpm", "eta"])
def test_noise_is_what_the_scheduler_draws(name, kind):
    """DiT's pipeline steps both halves of its guidance batch, each with noise of its own."""
    sample = Sample(name)
    scheduler, settings = sample.pipe.scheduler, {}
    if kind == "ddpm":
        sample.pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
        expected = sample()
    elif name == "sd15_of_three":
        sample.more = {"eta": 0.7}
        expected = sample()
        assert distance(solved(sample, tolerance=0.0)[0], expected) < 1e-5
        # another than the pipeline's own
        sample.more, settings = {"eta": 0.2}, {"eta": 0.7}
    else:
        # it has no argument for it
        scheduler.step = functools.partial(scheduler.step, eta=0.7)
        expected = sample()
        del scheduler.step
        settings = {"eta": 0.7}
    assert distance(expected, exact(name)) > 0.01
    assert distance(solved(sample, tolerance=0.0, **settings)[0], expected) < 1e-5


def test_noise_of_the_process_stays_to_be_drawn():
    denoiser, sampler, found = denoiser_of("sd21"), Sampler("sd21", batch=2), []
    for time in (None, TimeParallel(tolerance=0.0)):
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        handle = parallelize(denoiser, time=time, simulate=True, scheduler=scheduler)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            found.append((sampler(denoiser, scheduler, 5), torch.rand(())))
        handle.remove()
    assert distance(found[1][0], found[0][0]) < 1e-5
    assert found[1][1] == found[0][1]


SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": ddim,
    "ddim, v": lambda: diffusers.DDIMScheduler(clip_sample=True, prediction_type="v_prediction", steps_offset=1),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_videos(kind):
    """SVD's latents have its picture beside them, and its Euler scheduler's are of another scale."""
    denoiser, sampler, scheduler = denoiser_of("svd"), Sampler("svd", batch=2), SCHEDULERS[kind]()
    expected = sampler(denoiser, SCHEDULERS[kind](), 4)
    handle = parallelize(denoiser, time=TimeParallel(tolerance=0.0), simulate=True, scheduler=scheduler)
    assert distance(sampler(denoiser, scheduler, 4), expected) < 1e-5
    states = handle.solved.trajectory
    assert distance(handle.solved.latents(0), expected) < 1e-5
    assert distance(handle.solved.latents(4), sampler.latents * scheduler.init_noise_sigma) < 1e-5
    # the result's noise apart, states have the variance of a denoiser's input
    assert 0.5 < float(states[:, 4].std()) < 2
    handle.remove()


def test_guidance_of_each_frame():
    """SVD's: its scale rises from frame to frame."""
    denoiser, sampler = denoiser_of("svd"), Sampler("svd")
    sampler.guidance = torch.linspace(1, 3, sampler.latents.shape[1]).view(1, -1, 1, 1, 1)
    scheduler = diffusers.EulerDiscreteScheduler()
    expected = sampler(denoiser, scheduler, 4)
    handle = parallelize(denoiser, time=TimeParallel(tolerance=0.0), simulate=True, scheduler=scheduler)
    assert distance(sampler(denoiser, scheduler, 4), expected) < 1e-5
    handle.remove()


@pytest.mark.parametrize(("name", "scale"), [("sd15", 1.0), ("dit", 1.0)])
def test_no_guidance(name, scale):
    sample = Sample(name)
    sample.more = {"guidance_scale": scale}
    expected = sample()
    assert distance(solved(sample, tolerance=0.0)[0], expected) < 1e-5


def test_a_tolerance_saves_iterations():
    sample = Sample("sd15")
    sample.more = {"num_inference_steps": 20}
    expected = sample()
    found, told = solved(sample, tolerance=1e-2)
    assert 1 < told.iterations[0] < 10
    assert 0 < distance(found, expected) < 0.02
    (residuals,) = told.residuals
    assert residuals.shape == (told.iterations[0], 19)
    # all begin as the noise, and what was finished is not looked at again
    assert not residuals[0].isnan().any()
    assert residuals[-1].isnan().sum() > 0
    assert residuals[-1].nan_to_num().max() <= 1e-2
    few, told = solved(sample, tolerance=1e-2, max_iterations=2)
    assert told.iterations == [2]
    assert told.unfinished[0] > 0
    assert distance(few, expected) > distance(found, expected)


def test_samples_of_a_batch_converge_each_on_its_own():
    """So each is what it is alone."""
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    both = Sampler("sd21", batch=2)
    text = both.kwargs["encoder_hidden_states"]
    both.latents[0] *= 3
    both.latents[1] /= 10
    handle = parallelize(denoiser, time=TimeParallel(tolerance=2e-3), simulate=True, scheduler=scheduler)
    found = both(denoiser, scheduler, 12)
    iterations = handle.solved.iterations
    for at in range(2):
        alone = Sampler("sd21")
        alone.latents, alone.kwargs = both.latents[at : at + 1], {"encoder_hidden_states": text[at::2]}
        assert distance(alone(denoiser, scheduler, 12), found[at : at + 1]) < 1e-4
        assert handle.solved.iterations == iterations[at : at + 1]
    handle.remove()
    assert iterations[0] < iterations[1]


def test_what_was_sampled_before_leaves_no_trace():
    denoiser, scheduler = denoiser_of("sd21"), ddim()
    one, three, large = Sampler("sd21"), Sampler("sd21", batch=3), Sampler("sd21", size=16)
    handle = parallelize(denoiser, time=TimeParallel(ranks=2), simulate=True, scheduler=scheduler)
    alone = one(denoiser, scheduler, 5)
    three(denoiser, scheduler, 4)
    assert torch.equal(one(denoiser, scheduler, 5), alone)
    for stop in (1, 2):
        large(denoiser, scheduler, 4, stop=stop)
        assert torch.equal(one(denoiser, scheduler, 5), alone)
    one(denoiser, scheduler, 5, stop=3)
    handle.reset()
    assert torch.equal(one(denoiser, scheduler, 5), alone)
    # a single step is the exact one
    single = one(denoiser, scheduler, 1)
    handle.remove()
    assert torch.equal(single, one(denoiser, ddim(), 1))
    assert torch.equal(one(denoiser, scheduler, 5), one(denoiser, ddim(), 5))
    assert "step" not in vars(scheduler)


# -- how the work is shared out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "ranks", "sizes"),
    [(15, 8, [2] * 7 + [1]), (16, 8, [2] * 8), (3, 4, [1, 1, 1, 0]), (7, 1, [7]), (0, 2, [0, 0])],
)
def test_shares(number, ranks, sizes):
    assert share_sizes(number, ranks) == sizes


def test_sizes_that_are_recorded():
    assert [rounded_up(size) for size in (1, 5, 8, 9, 15, 17, 33)] == [1, 5, 8, 10, 16, 20, 40]


def test_counts():
    """Halves of the guidance batch are work of their own; a batch has at most so many of them."""
    denoiser, scheduler, sampler = denoiser_of("sd21"), ddim(), Sampler("sd21")
    time = TimeParallel(ranks=2, tolerance=0.0, batch=3)
    handle = parallelize(denoiser, time=time, simulate=True, scheduler=scheduler)
    calls = []
    with_calls = denoiser.conv_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    sampler(denoiser, scheduler, 5)
    with_calls.remove()
    # the exact step, then 4, 3, 2 and 1 states: two halves of each on two ranks, in batches of 3
    assert calls == [2, 3, 1, 3, 1, 3, 3, 2, 2, 1, 1]
    assert (handle.exact_steps, handle.asynchronous_steps) == (1, 4)
    # each rank's go to the other
    assert handle.sent_bytes == 2 * (4 + 3 + 2 + 1) * (4 * 8 * 8 * 4)
    assert handle.bytes_per_step == handle.sent_bytes // 4
    handle.remove()


@pytest.mark.parametrize(("name", "settings"), [("sd15", {"ranks": 3}), ("dit_of_three", {"batch": 4})])
def test_replays_give_what_runs_give(name, settings):
    sample = pipeline_of(name)
    expected, _ = solved(sample, **settings)
    with captured(FakeRecorder()) as recorder:
        found, _ = solved(sample, capture=True, **settings)
    # batches are filled up to sizes of which there are few
    assert distance(found, expected) < 1e-5
    assert recorder.replays > 0
    assert recorder.alive == 0


# -- from another trajectory ------------------------------------------------------------------------------------------


def test_from_its_own_trajectory_there_is_one_iteration():
    sample = Sample("sd15")
    sample.more = {"num_inference_steps": 10}
    expected, told = solved(sample, tolerance=1e-3)
    again, fast = solved(sample, tolerance=1e-2, initial_trajectory=told.trajectory)
    assert fast.iterations == [1] < told.iterations
    assert distance(again, expected) < 1e-2


def test_from_anothers_trajectory():
    sample = pipeline_of("sd15")
    expected = exact("sd15")
    _, other = solved(Other(sample, 6))
    start = {"initial_trajectory": other.trajectory, "tolerance": 0.0}
    # all steps: exact for its own noise and texts
    assert distance(solved(sample, **start)[0], expected) < 1e-5
    assert distance(solved(sample, variation_steps=6, **start)[0], expected) < 1e-5
    for method in ("triangular_anderson", "picard"):
        found, told = solved(sample, method=method, variation_steps=3, **start)
        assert told.iterations == [3]
        # the noisier states stay the other's
        assert torch.equal(told.trajectory[:, 3:5], other.trajectory[:, 3:5])
        assert distance(found, expected) > 0.01


class Other:
    """The same pipeline with other inputs."""

    def __init__(self, sample, seed):
        self.pipe, self._sample, self._seed = sample.pipe, sample, seed

    def __call__(self):
        return self._sample(self._seed)


def test_what_gives_trajectories_is_asked_for_the_steps():
    asked = []
    solved(pipeline_of("sd15"), initial_trajectory=lambda steps: asked.append(steps))
    assert asked == [6]
