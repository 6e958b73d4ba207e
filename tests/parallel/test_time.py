"""Parallel in time in one process that plays all ranks: what it computes, and what is refused.

The ranks themselves: test_time_ranks.py.
"""

import functools
import inspect

import diffusers
import pytest
import torch
from denoisers import Sampler, build, ddim
from fake_graph import FakeRecorder, captured
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import TimeParallel, WarmUp, parallelize
from asyncdiff_pl.parallel.steps.place import Place
from asyncdiff_pl.parallel.time.combination import Combination
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


def solved(sample, capture=None, **settings):
    """What a pipeline makes, and what is told of it."""
    handle = parallelize(sample.pipe, time=TimeParallel(**settings), simulate=True, capture=capture)
    try:
        return sample(), handle.solved
    finally:
        handle.remove()


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


# -- what a pipeline does with estimates ------------------------------------------------------------------------------

GIVEN = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
ESTIMATE = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
FIRST, SECOND = ESTIMATE[:, :4].chunk(2)
FRAMES = torch.tensor([1.0, 1.5, 2.0, 2.5]).view(1, 4, 1)


@pytest.mark.parametrize(
    ("place", "output", "repeats", "scale"),
    [
        (Place(2, 2), FIRST + 7.5 * (SECOND - FIRST), 1, 7.5),
        (Place(2, 2), SECOND + 4.0 * (FIRST - SECOND), 1, -3.0),
        (Place(2, 2), FIRST + FRAMES * (SECOND - FIRST), 1, FRAMES),
        # both halves stepped
        (Place(4, 1), (SECOND + 4.0 * (FIRST - SECOND)).repeat(2, 1, 1), 2, -3.0),
        (Place(4, 1), ESTIMATE[:, :4], 1, None),
        (Place(4, 1), ESTIMATE, 1, None),
        # rescaled, one half alone is another's, more than two, of another shape
        (Place(2, 2), 0.9 * (FIRST + 7.5 * (SECOND - FIRST)), 1, "refused"),
        (Place(2, 2), FIRST.flip(0) + 7.5 * (SECOND - FIRST), 1, "refused"),
        (Place(1, 4), FIRST[:1], 1, "refused"),
        (Place(2, 2), FIRST[..., 0], 1, "refused"),
        (Place(2, 2), FIRST[:1], 1, "refused"),
    ],
)
def test_combinations(place, output, repeats, scale):
    found = Combination.find(place, GIVEN, ESTIMATE, output)
    if isinstance(scale, str):
        assert found is None
        return
    assert (found.repeats, found.place.copies) == (repeats, 1 if scale is None else 2)
    if scale is not None:
        torch.testing.assert_close(found.scale, torch.as_tensor(scale).expand_as(found.scale))
    halves = [*ESTIMATE.chunk(found.place.copies)]
    torch.testing.assert_close(torch.cat([found(halves)] * repeats), output)
    assert found.differs(ESTIMATE, output * 1.01)


def test_equal_halves_leave_the_scale_open():
    estimate = ESTIMATE[:2].repeat(2, 1, 1)
    found = Combination.find(Place(2, 2), GIVEN, estimate, estimate[:2])
    torch.testing.assert_close(found([*estimate.chunk(2)]), estimate[:2])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "newton"}, "method is newton; take triangular_anderson or picard"),
        ({"ranks": 0}, "ranks is 0; give 1 or more"),
        ({"window": 0}, "window is 0; give 1 or more"),
        ({"memory": 0}, "memory is 0; give 1 or more"),
        ({"tolerance": -1.0}, "tolerance is -1.0; give 0"),
        ({"eta": 2.0}, "eta is 2.0; give one from 0"),
        ({"variation_steps": 3}, "variation_steps is 3, but there is no initial_trajectory"),
        ({"method": "picard", "order": 20}, "order is for triangular_anderson, and method is picard; leave order"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimeParallel(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stages": 2}, "stages is 2; set it to 1"),
        ({"steps": 2}, "steps is 2; set it to 1"),
        ({"cfg": 2}, "cfg is 2; set it to 1"),
        ({"warm_up": 5}, "warm_up is 5, and steps that are solved together have none"),
        ({"warm_up": WarmUp(until_noise=0.9)}, "solved together have none"),
        ({"refresh_every": 4}, "refresh_every is for stages, and steps that are solved together are asked for"),
        ({"simulate": False}, "needs 2 ranks, but no process group is initialised"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, sentence):
    given = {"time": TimeParallel(ranks=2), "simulate": True, "scheduler": ddim()} | settings
    with pytest.raises(ValueError, match=sentence):
        parallelize(denoiser_of("sd21"), **given)


def refused(sample, sentence, **settings):
    with pytest.raises(ValueError, match=sentence):
        solved(sample, **settings)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sd15_pndm", "PNDMScheduler cannot be solved in parallel in time.*take ddim, ddpm or euler_discrete"),
        ("flux", "FlowMatchEulerDiscreteScheduler cannot be solved"),
        ("controlnet", "down_block_additional_residuals, which a ControlNet makes .* take stages or cfg"),
        ("sd15_guidance_ends", "inputs changed at step 3 of a sample, and all its steps were solved"),
    ],
)
def test_pipelines_that_are_refused(name, sentence):
    refused(pipeline_of(name), sentence)


def test_several_calls_a_step():
    sample = Sample("flux_true_cfg")
    sample.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    sample.pipe.scheduler.set_timesteps = functools.partial(set_timesteps, sample.pipe.scheduler)
    refused(sample, "calls the denoiser more than once a step")


def set_timesteps(scheduler, num_inference_steps=None, device=None, sigmas=None, mu=None):
    type(scheduler).set_timesteps(scheduler, len(sigmas), device)


def test_guidance_that_is_not_known():
    sample = Sample("sd15")
    sample.more = {"guidance_rescale": 0.7}
    refused(sample, r"first step's model output is not u \+ s \(c - u\).*guidance_rescale")


def stepwise(**changes):
    """A callback that changes something after a step."""

    def change(pipe, step, timestep, given):
        if step == 2:
            if "scale" in changes:
                pipe._guidance_scale = changes["scale"]
            return {name: value * changes.get(name, 1) for name, value in given.items()}
        return given

    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scale": 5.0}, "Guidance changed in the course of a sample"),
        ({"latents": 1.1}, "changed latents or other inputs of the denoiser in the course"),
        ({"prompt_embeds": 1.1}, "changed latents or other inputs of the denoiser in the course"),
    ],
)
def test_what_a_callback_changes(change, sentence):
    sample = Sample("sd15")
    sample.more = stepwise(**change)
    refused(sample, sentence)
    # one that changes nothing is welcome
    sample.more = stepwise()
    solved(sample)


def test_pictures_that_a_pipeline_blends_in_after_each_step():
    """Inpainting with a denoiser of 4 channels."""
    sample = Sample("sdxl_inpaint")
    sample.pipe.register_modules(unet=Sample("sdxl").pipe.unet)
    refused(sample, "changed latents or other inputs")


def test_noise_that_a_scheduler_does_not_take():
    sample = Sample("sd15")
    sample.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    refused(sample, "eta is 0.5, and the step of EulerDiscreteScheduler takes none", eta=0.5)


def test_a_trajectory_that_does_not_fit():
    trajectory = torch.zeros(1, 5, 4, 8, 8)
    sentence = r"initial_trajectory is \(1, 5, 4, 8, 8\), but 6 steps of these latents need \(1, 7, 4, 8, 8\)"
    refused(pipeline_of("sd15"), sentence, initial_trajectory=trajectory)
    with pytest.raises(ValueError, match="variation_steps is 9; give one from 1 to the number of steps, 6"):
        solved(pipeline_of("sd15"), initial_trajectory=torch.zeros(1, 7, 4, 8, 8), variation_steps=9)


def test_arguments_of_a_step_that_are_not_known():
    denoiser, sampler, scheduler = denoiser_of("sd21"), Sampler("sd21"), ddim()
    handle = parallelize(denoiser, time=TimeParallel(), simulate=True, scheduler=scheduler)
    own = scheduler.step
    assert "use_clipped_model_output" in inspect.signature(own).parameters

    class Clipping:
        def __getattr__(self, name):
            return getattr(scheduler, name)

        def step(self, *args):
            return own(*args, use_clipped_model_output=True)

    with pytest.raises(ValueError, match="is given use_clipped_model_output, which solving steps together does not"):
        sampler(denoiser, Clipping(), 4)
    handle.remove()
