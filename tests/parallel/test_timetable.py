"""Timesteps on the CPU: real schedulers on a device where waiting raises (far_device.py)."""

import contextlib
import copy
import inspect

import diffusers
import pytest
import torch
from far_device import FAR, Far, FarDevice, WaitsError, near
from torch import nn

from asyncdiff_pl.parallel.stages.timestep import with_timestep
from asyncdiff_pl.parallel.timetable import Timetable, upload
from asyncdiff_pl.parallel.trajectory import Trajectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("IPNDMScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    # these move noise of a generator on the CPU, or numbers of their tables, to the device
    ("DDIMScheduler", {"rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]
WAITING = {
    # its table is on the device, and it compares with it
    "FlowMatchHeunDiscreteScheduler": "scheduling_flow_match_heun_discrete.py",
}
"""Schedulers whose own steps wait, out of anyone's reach: and where."""


class Denoiser(nn.Module):
    def forward(self, sample, timestep, timestep_cond=None):
        # as networks take it: a tensor beside the latents, of one timestep or one a sample
        timestep = timestep[None] if timestep.ndim == 0 else timestep
        return 0.1 * sample * (timestep / 1000).expand(len(sample)).reshape(-1, 1, 1, 1).to(sample.dtype)


def build(name, config=None):
    return getattr(diffusers, name)(**(config or {}))


class House:
    """A denoiser, its scheduler, and the timetable between them."""

    def __init__(self, scheduler, others=()):
        self.scheduler = scheduler
        self.denoiser = Denoiser()
        self.trajectory = Trajectory(self.denoiser, lambda: self.scheduler)
        self.timetable = Timetable(self.trajectory, self.denoiser, others)

    def begin(self, steps=4, device="cpu"):
        self.scheduler.set_timesteps(steps, device=device)
        return self.scheduler.timesteps

    def loop(self, latents, timesteps):
        generator = torch.Generator().manual_seed(3)
        takes = inspect.signature(self.scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        for t in timesteps:
            scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(latents, t)
            latents = self.scheduler.step(self.denoiser(scaled, t), t, latents, **more).prev_sample
        return latents


def first_latents():
    return torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_no_step_waits(name, config):
    plain = build(name, config)
    plain.set_timesteps(4)
    untouched = House(plain)
    untouched.timetable.remove()
    expected = untouched.loop(first_latents(), plain.timesteps)
    house = House(build(name, config))
    assert torch.equal(house.loop(first_latents(), house.begin()), expected)

    with FarDevice() as device:
        house = House(build(name, config))
        for _ in range(2):
            timesteps = house.begin(device=FAR)
            assert timesteps.device.type == "cpu"
            with device.watch():
                found = near(house.loop(device.put(first_latents()), timesteps))
            assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", WAITING)
def test_steps_that_wait_themselves_still_step(name):
    house = House(build(name))
    expected = house.loop(first_latents(), house.begin())
    with FarDevice() as device:
        house = House(build(name))
        timesteps = house.begin(device=FAR)
        with device.watch(), pytest.raises(WaitsError) as raised:
            house.loop(device.put(first_latents()), timesteps)
        assert any(WAITING[name] in str(entry) for entry in raised.traceback)
        found = near(house.loop(device.put(first_latents()), house.begin(device=FAR)))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_sample_begins_once():
    with FarDevice() as device:
        house, seen = House(build("EulerDiscreteScheduler")), []
        for steps in (3, 2):
            timesteps = house.begin(steps, FAR)
            assert house.scheduler.timesteps is timesteps
            house.loop(device.put(first_latents()), timesteps)
            seen.append((house.trajectory.position, house.trajectory.num_steps))
            assert house.trajectory.timesteps is timesteps
    assert seen == [(3, 3), (2, 2)]


class Foreign(diffusers.EulerDiscreteScheduler):
    """A user's, whose step wants its timesteps beside the latents."""

    def step(self, model_output, timestep, sample, return_dict=True):
        assert self.timesteps.device == sample.device
        return super().step(model_output, timestep, sample, return_dict=return_dict)


def test_the_scheduler_of_somebody_else_is_left_alone():
    house = House(Foreign())
    expected = house.loop(first_latents(), house.begin())
    with FarDevice() as device:
        house = House(Foreign())
        timesteps = house.begin(device=FAR)
        assert isinstance(timesteps, Far)
        assert torch.allclose(near(house.loop(device.put(first_latents()), timesteps)), expected, atol=1e-6)


def test_another_scheduler_is_followed_from_its_second_sample_on():
    with FarDevice() as device:
        house = House(build("EulerDiscreteScheduler"))
        first = house.scheduler
        house.loop(device.put(first_latents()), house.begin(device=FAR))
        house.scheduler = build("DDIMScheduler")
        timesteps = house.begin(device=FAR)
        assert isinstance(timesteps, Far)
        house.loop(device.put(first_latents()), timesteps)
        assert house.trajectory.timesteps is timesteps
        assert "set_timesteps" not in vars(first)
        timesteps = house.begin(device=FAR)
        with device.watch():
            house.loop(device.put(first_latents()), timesteps)


def test_a_copied_scheduler_sets_its_own_timesteps():
    house = House(build("EulerDiscreteScheduler"))
    own = house.begin(3)
    other = copy.deepcopy(house.scheduler)
    other.set_timesteps(5)
    assert (len(other.timesteps), house.scheduler.timesteps is own) == (5, True)


def test_pipelines_still_see_what_arguments_set_timesteps_takes():
    scheduler = build("FlowMatchEulerDiscreteScheduler")
    expected = inspect.signature(scheduler.set_timesteps)
    house = House(scheduler)
    assert inspect.signature(house.scheduler.set_timesteps) == expected


def test_removal_leaves_nothing():
    scheduler, other = build("DDIMScheduler"), Denoiser()
    before = set(vars(scheduler))
    house = House(scheduler, [other])
    house.loop(first_latents(), house.begin())
    house.timetable.remove()
    house.trajectory.remove()
    assert set(vars(scheduler)) == before
    assert not house.denoiser._forward_pre_hooks
    assert not other._forward_pre_hooks


def test_other_networks_get_the_timestep_beside_their_input_too():
    other = Denoiser()
    house = House(build("DDIMScheduler"), [other])
    t = house.begin()[1]
    with FarDevice() as device:
        latents = device.put(first_latents())
        with device.watch():
            found = near(other(latents, timestep=t))
    assert torch.equal(found, Denoiser()(first_latents(), t))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        lambda t: t,
        lambda t: t.expand(2),
        lambda t: t.expand(2).to(torch.bfloat16) / 1000,
        lambda t: t.to(torch.float32)[None],
    ],
)
def test_another_steps_timestep_in_the_pipelines_form(form, halved):
    """As time shift and stride 2 give it, in halves of the guidance batch as well; without waiting, to the bit."""

    def run(put, watch=contextlib.nullcontext):
        house, found = House(build("DDIMScheduler")), []
        whole = house.denoiser.forward

        def forward(sample, timestep, timestep_cond=None):
            if house.trajectory.position == 2:
                half = timestep.chunk(2)[0] if halved and timestep.numel() > 1 else timestep
                with watch():
                    found.append(with_timestep(whole, (sample, half), {}, house.trajectory, 1)[0][1])
            return whole(sample, timestep)

        house.denoiser.forward = forward
        house.begin(device=put(torch.ones(1)).device)
        latents = put(first_latents())
        for t in house.scheduler.timesteps:
            latents = house.scheduler.step(house.denoiser(latents, form(t)), t, latents).prev_sample
        return found[0], form(house.scheduler.timesteps[1])

    expected, of_pipeline = run(lambda x: x)
    assert torch.equal(expected, of_pipeline[: len(expected)] if expected.ndim else of_pipeline)
    with FarDevice() as device:
        found = run(device.put, device.watch)[0]
    assert isinstance(found, Far)
    assert found.dtype == expected.dtype
    assert torch.equal(near(found), expected)


def test_an_upload_waits_for_nothing():
    with FarDevice(watched=True) as device:
        beside = device.put(torch.ones(1))
        assert torch.equal(near(upload(torch.tensor(3).expand(4), FAR)), torch.full((4,), 3))
        assert upload(beside, FAR) is beside
    plain = torch.tensor(3)
    assert upload(plain, plain.device) is plain
