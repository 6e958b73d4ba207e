"""Weights of losses against tables worked out by hand."""

import pytest
import torch

from asyncdiff_pl.training.loss_weights import LearnedUncertainty, MinSNRWeight, P2Weight, UniformWeight

SNR = torch.tensor([9.0, 5.0, 1.0, 0.25, 0.0], dtype=torch.float64)
ALPHAS_CUMPROD = SNR / (1 + SNR)
LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def weights_of(weight, prediction_type):
    weight.build(ALPHAS_CUMPROD, prediction_type)
    return (weight.weight(LOSSES.flip(0), torch.arange(5).flip(0)) / LOSSES.flip(0)).flip(0).tolist()


@pytest.mark.parametrize(
    ("weight", "prediction_type", "expected"),
    [
        (UniformWeight(), "epsilon", [1, 1, 1, 1, 1]),
        (MinSNRWeight(5), "epsilon", [5 / 9, 1, 1, 1, 1]),
        (MinSNRWeight(5), "v_prediction", [5 / 10, 5 / 6, 1 / 2, 0.25 / 1.25, 0]),
        (MinSNRWeight(5), "sample", [5, 5, 1, 0.25, 0]),
        (P2Weight(1), "epsilon", [1 / 10, 1 / 6, 1 / 2, 1 / 1.25, 1]),
        (P2Weight(0.5), "epsilon", [0.1**0.5, (1 / 6) ** 0.5, 0.5**0.5, 0.8**0.5, 1]),
        (P2Weight(1), "v_prediction", [0.9 / 10, 5 / 36, 0.25, 0.2 / 1.25, 0]),
        (P2Weight(1, k=2), "sample", [9 / 11, 5 / 7, 1 / 3, 0.25 / 2.25, 0]),
    ],
)
def test_weights_at_some_ratios(weight, prediction_type, expected):
    assert weights_of(weight, prediction_type) == pytest.approx(expected)


@pytest.mark.parametrize(("gamma", "mean"), [(1.0, 0.724), (0.5, 0.806)])
def test_mean_weight_of_p2_over_ddpms_timesteps(gamma, mean):
    weight = P2Weight(gamma)
    weight.build((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0), "epsilon")
    assert weight.weight(torch.ones(1000), torch.arange(1000)).mean().item() == pytest.approx(mean, abs=1e-3)


def test_learned_uncertainty_finds_the_logarithm_of_each_loss():
    weight = LearnedUncertainty()
    weight.build(ALPHAS_CUMPROD.clamp(min=1e-3), "epsilon")
    timesteps = torch.arange(5)
    # u is 0 at first
    assert weight.weight(LOSSES, timesteps).tolist() == LOSSES.tolist()
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        weight.weight(LOSSES, timesteps).mean().backward()
        optimizer.step()
    # the least of L / e^u + u is 1 + ln L, where the weight 1 / e^u is 1 / L
    losses = LOSSES.clone().requires_grad_()
    found = weight.weight(losses, timesteps)
    torch.testing.assert_close(found, 1 + LOSSES.log(), atol=0.02, rtol=0)
    (slopes,) = torch.autograd.grad(found.sum(), losses)
    torch.testing.assert_close(slopes, 1 / LOSSES, atol=0.02, rtol=0.05)


def test_learned_uncertainty_goes_on_from_its_saved_state():
    one, other = LearnedUncertainty(), LearnedUncertainty()
    for weight in (one, other):
        weight.build(ALPHAS_CUMPROD, "epsilon")
    torch.nn.init.normal_(one.uncertainty.weight)
    other.load_state_dict(one.state_dict())
    timesteps = torch.arange(5)
    assert other.weight(LOSSES, timesteps).tolist() == one.weight(LOSSES, timesteps).tolist()
    assert other.weight(LOSSES, timesteps).isfinite().all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: P2Weight(gamma=-1), "gamma is -1 and k 1.0; give gamma from 0 up"),
        (lambda: MinSNRWeight(0), "gamma is 0; give a signal-to-noise ratio above 0"),
        (lambda: LearnedUncertainty(0), "features is 0; give a number from 1 up"),
    ],
)
def test_bad_settings_of_weights(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
