import diffusers
import pytest

from asyncdiff_pl.models.schedulers import build_scheduler

OWN = diffusers.EulerDiscreteScheduler(beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euler_discrete", diffusers.EulerDiscreteScheduler),
        ("ddpm", diffusers.DDPMScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("pndm", diffusers.PNDMScheduler),
        ("dpm_solver_multistep", diffusers.DPMSolverMultistepScheduler),
        ("HeunDiscreteScheduler", diffusers.HeunDiscreteScheduler),
        ("diffusers.DPMSolverMultistepScheduler", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_schedulers_are_built_from_the_checkpoints_config(name, expected):
    scheduler = build_scheduler(name, OWN)
    assert type(scheduler) is expected
    assert scheduler is not OWN
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.prediction_type == "v_prediction"


def test_no_scheduler_name_keeps_the_checkpoints_own():
    assert build_scheduler(None, OWN) is OWN


@pytest.mark.parametrize("name", [None, "ddim"])
def test_entries_of_a_schedulers_config_may_differ(name):
    scheduler = build_scheduler(name, OWN, {"beta_schedule": "linear", "steps_offset": 1})
    assert (scheduler.config.beta_schedule, scheduler.config.steps_offset) == ("linear", 1)
    assert scheduler.config.beta_end == 0.012
    assert OWN.config.beta_schedule == "scaled_linear"
    with pytest.raises(ValueError, match=r"scheduler_config has beta, which \w+Scheduler does not know; it knows"):
        build_scheduler(name, OWN, {"beta": 1})


@pytest.mark.parametrize("name", ["eulr", "diffusers.NoSuchScheduler", "no_such_package.Scheduler", "", "torch.Tensor"])
def test_unknown_schedulers(name):
    with pytest.raises(ValueError, match=f"There is no scheduler {name}; take euler_discrete, ddpm"):
        build_scheduler(name, OWN)
