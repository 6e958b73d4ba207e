"""Where a pipeline stands: samples, steps and calls, with real schedulers."""

import copy
import inspect

import diffusers
import pytest
import torch
from torch import nn

from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener

# schedulers in NumPy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Denoiser(nn.Module):
    def forward(self, sample, timestep):
        return 0.1 * sample


class Diary(TrajectoryListener):
    """Writes down all that is heard, in words."""

    def __init__(self):
        self.entries = []

    def on_sample_begin(self, trajectory):
        self.entries.append(f"sample of {trajectory.num_steps}")

    def on_denoiser_call(self, trajectory):
        self.entries.append(f"call {trajectory.position}.{trajectory.call}")

    def on_step(self, trajectory, output):
        self.entries.append(f"step {trajectory.position}")


class House:
    """A denoiser, its scheduler and a diary of both."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.denoiser = Denoiser()
        self.trajectory = Trajectory(self.denoiser, lambda: self.scheduler)
        self.diary = Diary()
        self.trajectory.subscribe(self.diary)

    def sample(self, steps=3, start=0, stop=None, calls=1):
        self.scheduler.set_timesteps(steps)
        if start and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        latents = torch.ones(1, 4, 2, 2)
        for t in self.scheduler.timesteps[start:stop]:
            for _ in range(calls):
                noise = self.denoiser(latents, t)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents

    def read(self):
        entries, self.diary.entries = self.diary.entries, []
        return entries


def expected(steps, calls=1):
    entries = [f"sample of {steps}"]
    for step in range(steps):
        entries += [*(f"call {step}.{call}" for call in range(calls)), f"step {step}"]
    return entries


# each scheduler, and how many steps it makes of three
SCHEDULERS = [
    ("DDIMScheduler", {}, 3),
    ("DDPMScheduler", {}, 3),
    ("EulerDiscreteScheduler", {}, 3),
    ("HeunDiscreteScheduler", {}, 5),
    ("KDPM2DiscreteScheduler", {}, 5),
    ("PNDMScheduler", {"skip_prk_steps": True}, 4),
    ("DPMSolverMultistepScheduler", {}, 3),
    ("UniPCMultistepScheduler", {}, 3),
]


@pytest.mark.parametrize(("name", "config", "steps"), SCHEDULERS)
def test_each_scheduler(name, config, steps):
    house = House(getattr(diffusers, name)(**config))
    for _ in range(2):
        house.sample(3)
        assert house.read() == expected(steps)


def test_two_calls_a_step():
    house = House(diffusers.DDIMScheduler())
    house.sample(2, calls=2)
    assert house.read() == expected(2, calls=2)


def test_a_loop_in_one_expression():
    """`step` is looked up before the denoiser is called."""
    house = House(diffusers.DDIMScheduler())
    house.scheduler.set_timesteps(2)
    for t in house.scheduler.timesteps:
        house.scheduler.step(house.denoiser(torch.ones(1), t), t, torch.ones(1))
    assert house.read() == expected(2)


def test_a_sample_that_was_broken_off():
    house = House(diffusers.DDIMScheduler())
    house.sample(4, stop=2)
    house.read()
    house.sample(3)
    assert house.read() == expected(3)


def test_reset():
    house = House(diffusers.DDIMScheduler())
    house.sample(4, stop=2)
    house.trajectory.reset()
    house.read()
    house.denoiser(torch.ones(1), torch.tensor(1))
    assert house.read() == ["sample of 4", "call 0.0"]


@pytest.mark.parametrize(
    ("name", "config", "start", "first", "left"),
    [
        ("EulerDiscreteScheduler", {}, 4, 4, 6),
        ("DPMSolverMultistepScheduler", {}, 7, 7, 3),
        ("HeunDiscreteScheduler", {}, 8, 8, 11),
        # these are not told where the pipeline starts
        ("DDIMScheduler", {}, 4, 4, 6),
        ("DDPMScheduler", {}, 9, 9, 1),
        ("PNDMScheduler", {"skip_prk_steps": True}, 5, 5, 6),
    ],
)
def test_a_start_amid_the_timesteps(name, config, start, first, left):
    """As image to image does with a strength below 1."""
    house = House(getattr(diffusers, name)(**config))
    house.sample(10, start=start)
    assert (house.trajectory.first_index, house.trajectory.num_steps) == (first, left)
    assert house.read()[0] == f"sample of {left}"
    house.sample(10)
    assert house.trajectory.first_index == 0


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_start_at_a_timestep_that_is_repeated(start):
    """The first call of PNDM does not tell which of the two it is; the second does."""
    house = House(diffusers.PNDMScheduler(skip_prk_steps=True))
    house.sample(10, start=start)
    assert (house.trajectory.first_index, house.trajectory.num_steps) == (start, 11 - start)


def test_another_scheduler():
    house = House(diffusers.DDIMScheduler())
    first = house.scheduler
    house.sample(3)
    house.scheduler = diffusers.EulerDiscreteScheduler()
    house.read()
    house.sample(2)
    assert house.read() == expected(2)
    assert "step" not in vars(first)
    house.scheduler = first
    house.sample(3)
    assert house.read() == expected(3)


def test_a_copied_scheduler_steps_itself_and_is_not_heard():
    """Pipelines for video with sound step a copy of the scheduler beside it."""
    house = House(diffusers.EulerDiscreteScheduler())
    house.sample(3)
    other = copy.deepcopy(house.scheduler)
    other.set_timesteps(3)
    index, _ = house.scheduler.step_index, house.read()
    other.step(torch.ones(1), other.timesteps[0], torch.ones(1))
    assert (other.step_index, house.scheduler.step_index) == (1, index)
    assert house.read() == []
    house.scheduler = other
    house.sample(2)
    assert house.read() == expected(2)


def test_a_scheduler_whose_step_others_wrapped_counts_once():
    house = House(diffusers.DDIMScheduler())
    house.sample(2)
    first, ours = house.scheduler, house.scheduler.step
    first.step = lambda *args, **kwargs: ours(*args, **kwargs)
    theirs = first.step
    house.scheduler = diffusers.DDIMScheduler()
    house.sample(2)
    house.scheduler = first
    house.read()
    house.sample(2)
    assert house.read() == expected(2)
    house.trajectory.remove()
    assert first.step is theirs
    house.sample(2)
    assert house.read() == []


def test_pipelines_still_see_what_arguments_step_takes():
    house = House(diffusers.DDIMScheduler())
    house.sample(1)
    assert {"eta", "generator"} <= set(inspect.signature(house.scheduler.step).parameters)


def test_removal_leaves_nothing():
    scheduler = diffusers.EulerDiscreteScheduler()
    before = set(vars(scheduler))
    house = House(scheduler)
    latents = house.sample(3)
    house.trajectory.remove()
    assert set(vars(scheduler)) == before
    assert not house.denoiser._forward_pre_hooks
    house.read()
    assert torch.equal(house.sample(3), latents)
    assert house.read() == []


def test_who_unsubscribed_hears_nothing():
    house = House(diffusers.DDIMScheduler())
    house.trajectory.unsubscribe(house.diary)
    house.sample(2)
    assert house.read() == []
