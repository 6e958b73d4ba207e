import diffusers
import pytest

from asyncdiff_pl.models.schedulers import build_scheduler, check_learned_variance

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


def test_learned_variances_that_nobody_takes():
    settings = {"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    settings |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.UNet2DModel(out_channels=6, **settings)
    own = diffusers.DDPMScheduler(variance_type="learned_range")
    check_learned_variance(network, own)
    check_learned_variance(diffusers.UNet2DModel(**settings), diffusers.DDIMScheduler())
    for name, changes in (("ddim", None), (None, {"variance_type": "fixed_small"})):
        with pytest.raises(ValueError, match=r"learned its steps' variances, which .* or take UnconditionalPredictor"):
            check_learned_variance(network, build_scheduler(name, own, changes))
