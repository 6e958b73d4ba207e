"""Trajectories of ordinary runs."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

from asyncdiff_pl.callbacks import TrajectoryWriter
from asyncdiff_pl.models.noise import sample_seed


def test_states_lead_from_the_noise_to_the_picture(run, tiny_predictor):
    (made,) = run([TrajectoryWriter(save=True)], tiny_predictor(num_inference_steps=3, num_frames=1), ids=("a/b",))
    (path,) = run.folder.rglob("*.safetensors")
    assert path.relative_to(run.folder).parts == ("trajectories", "steps=3", "a%2Fb.safetensors")
    with safe_open(path, "pt") as file:
        states, metadata = file.get_tensor("states"), file.metadata()
    assert states.shape == (4, 3, 16, 16)
    generator = torch.Generator().manual_seed(sample_seed(0, "a/b"))
    assert torch.equal(states[3], torch.randn(1, 3, 16, 16, generator=generator)[0])
    picture = np.asarray(made[0].frames[0]).transpose(2, 0, 1) / 255
    assert np.abs((states[0] / 2 + 0.5).clamp(0, 1).numpy() - picture).max() < 1 / 255
    assert metadata["scheduler"] == "DDIMScheduler"
    assert json.loads(metadata["timesteps"]) == [666, 333, 0]


def test_nothing_is_saved_unasked(run, tiny_predictor):
    run([TrajectoryWriter()], tiny_predictor(num_frames=1))
    assert not (run.folder / "trajectories").exists()


def test_refusals(run, tiny_predictor):
    with pytest.raises(ValueError, match="3 latents are denoised at a time for 1 samples"):
        run([TrajectoryWriter(save=True)], tiny_predictor(num_frames=3))
    module = tiny_predictor(num_frames=1)
    module.configure_model()
    module.pipeline.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    module.configure_model = lambda: None
    with pytest.raises(ValueError, match="no run could begin with such states: "):
        run([TrajectoryWriter(save=True)], module)
