"""Timestep samplers against tables worked out by hand."""

import tempfile

import pytest
import torch

from asyncdiff_pl.training.timesteps import AdaptiveTimesteps, BetaPolicy, LossSecondMoment, SpeeD, UniformTimesteps
from asyncdiff_pl.training.timesteps.base import draw_from
from asyncdiff_pl.training.timesteps.beta_policy import best_predictors

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
"""β of DDPM."""


def built(sampler, alphas_cumprod=None):
    """A sampler that knows its noise levels: DDPM's, if none are given."""
    sampler.build((1 - LINEAR).cumprod(0).float() if alphas_cumprod is None else alphas_cumprod)
    return sampler


def pictures(number):
    return torch.zeros(number, 3, 2, 2)


def test_uniform_timesteps_cover_all_evenly():
    sampler = built(UniformTimesteps(spread=True), torch.linspace(0.9, 0.1, 10))
    timesteps, weights = sampler.draw(pictures(100))
    assert timesteps.bincount().tolist() == [10] * 10
    assert weights.tolist() == [1.0] * 100
    timesteps, _ = built(UniformTimesteps(), torch.linspace(0.9, 0.1, 10)).draw(pictures(20_000))
    assert timesteps.bincount() / 20_000 == pytest.approx([0.1] * 10, abs=0.015)


@pytest.mark.parametrize("spread", [False, True])
def test_draws_have_their_probabilities(spread):
    drawn = draw_from(torch.tensor([0.5, 0.0, 0.25, 0.25]), 4000, spread)
    expected = [0.5, 0, 0.25, 0.25]
    assert (drawn.bincount(minlength=4) / 4000).tolist() == pytest.approx(expected, abs=1e-3 if spread else 0.04)


def quadratic():
    return (1 - torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def cosine():
    signal = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - (1 - signal[1:] / signal[:-1]).clamp(max=0.999)).cumprod(0)


@pytest.mark.parametrize(
    ("alphas_cumprod", "turn"), [((1 - LINEAR).cumprod(0), 642), (quadratic(), 829), (cosine(), 959)]
)
def test_speed_draws_before_its_turn_five_times_as_often_and_mirrors(alphas_cumprod, turn):
    sampler = built(SpeeD(), alphas_cumprod)
    assert sampler.turn == turn
    torch.testing.assert_close(sampler.probabilities[:600] / sampler.probabilities[-1], torch.full((600,), 5.0))
    assert sampler.probabilities.sum().item() == pytest.approx(1)
    timesteps, weights = sampler.draw(pictures(101))
    drawn, mirrored = timesteps[:51].tolist(), timesteps[51:].tolist()
    assert mirrored == [turn - t if t < turn else t - turn for t in drawn][:50]
    torch.testing.assert_close(weights, 1 - alphas_cumprod[timesteps].float())
    assert built(SpeeD(weigh=False), alphas_cumprod).draw(pictures(3))[1].tolist() == [1.0] * 3


def test_speed_needs_timesteps_of_little_change():
    with pytest.raises(ValueError, match=r"changes by 0.\d+ or more at each of the 4 timesteps, and SpeeD needs"):
        built(SpeeD(), torch.tensor([0.9, 0.6, 0.3, 0.05]))


def test_the_second_moment_weighs_draws_so_that_the_mean_stays():
    sampler = built(LossSecondMoment(history=2, even_share=0.25), torch.tensor([0.9, 0.6, 0.2]))
    sampler.update(torch.tensor([0, 1, 0, 2, 0]), torch.tensor([9.0, 1.0, 3.0, 0.0, 4.0]))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([2, 1]), torch.tensor([0.0, 7.0]))
    # of timestep 0 the last two count, in 3 and 4: √(25 / 2); of timestep 1 1 and 7: √(50 / 2); of timestep 2 nothing
    sizes = [12.5**0.5, 5.0, 0.0]
    expected = [0.75 * size / sum(sizes) + 0.25 / 3 for size in sizes]
    assert sampler.probabilities().tolist() == pytest.approx(expected)
    timesteps, weights = sampler.draw(pictures(60_000))
    values = torch.tensor([2.0, -1.0, 5.0])
    assert (weights * values[timesteps]).mean().item() == pytest.approx(2.0, abs=0.05)
    torch.testing.assert_close(weights, 1 / (3 * torch.tensor(expected)[timesteps]))


def test_the_second_moment_sees_the_losses_of_all_ranks():
    sampler = built(LossSecondMoment(history=1), torch.tensor([0.9, 0.2]))
    sampler.gather = lambda values: torch.cat([values, 1 - values])
    sampler.update(torch.tensor([0]), torch.tensor([0.8]))
    assert sampler.probabilities().tolist() == pytest.approx([0.8, 0.2], abs=1e-3)


def test_the_adaptive_sampler_draws_by_progress_and_size_of_losses():
    sampler = built(AdaptiveTimesteps(follow=0.5, even_share=0.2))
    assert sampler.shares()[1].tolist() == pytest.approx([1e-3] * 1000)
    levels = int(sampler.level.max()) + 1
    # the first half has losses of 0.16 and no progress, the second 0.01 after a slow mean of 0.02
    fast = torch.where(torch.arange(levels) < levels // 2, 0.16, 0.01)
    sampler.sums[:, 0] = 10.0
    sampler.sums[0, 1] = 10 * fast
    sampler.sums[1, 1] = 10 * fast * torch.where(torch.arange(levels) < levels // 2, 1.0, 2.0)
    counts, probabilities = sampler.shares()
    progress = torch.zeros(1000)
    progress[sampler.level >= levels // 2] = 2.0
    # a level's neighbours count half
    progress[sampler.level == levels // 2] = 2**0.75
    progress[sampler.level == levels // 2 - 1] = 2**0.25
    progress = progress.log().clamp(min=0) + 1e-3
    expected = 0.5 + 0.5 * progress / (progress + progress.mean() / 4)
    torch.testing.assert_close(counts, expected / expected.mean())
    density = counts * fast.sqrt()[sampler.level]
    torch.testing.assert_close(probabilities, 0.8 * density / density.sum() + 0.2e-3)


@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_the_adaptive_samplers_weights_undo_its_density(correction):
    sampler = built(AdaptiveTimesteps(follow=0.0, correction=correction))
    torch.manual_seed(0)
    losses = 1 / (1 + torch.arange(1000.0)) ** 0.5
    for _ in range(400):
        timesteps, weights = sampler.draw(pictures(64))
        sampler.update(timesteps, losses[timesteps])
    _, probabilities = sampler.shares()
    assert probabilities[3] > 2 * probabilities[900]
    timesteps, weights = sampler.draw(pictures(8192))
    assert weights.max() <= 4
    torch.testing.assert_close(weights, (1 / (1000 * probabilities[timesteps])) ** correction)
    found = (weights * losses[timesteps]).mean().item()
    expected = (probabilities * (1 / (1000 * probabilities)) ** correction * losses).sum().item()
    # one of each part: a fiftieth of the error of independent draws
    assert found == pytest.approx(expected, rel=2e-3)
    if correction == 1:
        assert expected == pytest.approx(losses.mean().item(), rel=1e-3)


def test_columns_that_tell_the_sum_of_rows():
    # sums 6, 12, 10: the second column follows them exactly, the third not at all, the first in part
    entries = torch.tensor([[2.0, 1.0, 3.0], [5.0, 4.0, 3.0], [4.0, 3.0, 3.0]])
    assert best_predictors(entries, 2)[1] in (0, 1)
    assert 2 not in best_predictors(entries, 2)
    assert best_predictors(torch.tensor([[0.0, 1.0], [5.0, 2.0], [0.0, 3.0]]), 1).tolist() == [0]


class Network:
    """Losses that a step brings down, by an amount for each timestep and image."""

    def __init__(self):
        self.step = 0.0
        self.asked = []

    def __call__(self, timesteps, clean, noise):
        self.asked.append((timesteps, noise))
        return 2.0 - self.step * (1 + timesteps) * clean.mean((1, 2, 3)) * torch.tensor([1.0, 3.0, 1.0, 2.0])[timesteps]


def policy(**settings):
    torch.manual_seed(0)
    sampler = built(BetaPolicy(grid=4, chosen=1, every=1, **settings), torch.tensor([0.9, 0.7, 0.4, 0.1]))
    sampler.optimizer = torch.optim.SGD(sampler.policy.parameters(), lr=1.0)
    return sampler


def train(sampler, clean, gain):
    network = Network()
    _, weights = sampler.draw(clean)
    assert weights.tolist() == [1.0] * len(clean)
    sampler.before_step(network, clean)
    network.step = gain
    sampler.after_step(network, clean)
    (before, first), (after, second) = network.asked
    assert torch.equal(before, after)
    assert torch.equal(first, second)
    return before, sampler._places_drawn


def test_the_beta_policys_step_is_that_of_reinforce():
    sampler = policy(entropy=0.01)
    clean = torch.stack([torch.full((3, 8, 8), value) for value in (0.1, 0.2, 0.3)])
    for gain in (0.01, 0.03, 0.02):
        asked, _ = train(sampler, clean, gain)
        assert asked.tolist() == [0, 1, 2, 3]
    # all timesteps gain in proportion, so each tells the sum: the choice is one of them
    best = sampler.best.item()
    last = sampler.policy[-1]
    assert last.bias.tolist() == [0.5, 0.5]
    asked, places = train(sampler, clean, 0.05)
    assert asked.tolist() == [0, 1, 2, 3, best, best, best]
    alphas = [0.9, 0.7 / 0.9, 0.4 / 0.7, 0.1 / 0.4]
    beta = 1 - alphas[best]
    nats = beta / (2 * alphas[best] * (1 - [0.9, 0.7, 0.4, 0.1][best]))
    rewards = [0.05 * (1 + best) * value * [1, 3, 1, 2][best] * nats * 192 for value in (0.1, 0.2, 0.3)]
    baseline = sum(rewards) / 3
    assert sampler.baseline.item() == pytest.approx(baseline, rel=1e-4)
    # d ln p / dα = ln u − ψ(α) + ψ(2α) at α = β; dα / d bias is the logistic function at 0.5
    alpha = torch.nn.functional.softplus(torch.tensor(0.5, dtype=torch.float64)) + 1e-5
    slope = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64))
    gradients = []
    for drawn in (places, 1 - places):
        score = drawn.double().log() - torch.digamma(alpha) + torch.digamma(2 * alpha)
        gradients.append(((torch.tensor(rewards) - baseline) * score).mean() * slope)
    # d entropy / dα at α = β: −(α − 1) ψ'(α) + (2α − 2) ψ'(2α)
    polygamma = [torch.polygamma(1, value) for value in (alpha, 2 * alpha)]
    spreading = (-(alpha - 1) * polygamma[0] + 2 * (alpha - 1) * polygamma[1]) * slope
    expected = torch.stack(gradients) + 0.01 * spreading
    assert (last.bias.double() - 0.5).tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert not any(parameter.requires_grad for parameter in sampler.parameters())


def test_policies_begin_alike_on_all_ranks_and_draw_from_nobodys_seed():
    torch.manual_seed(1)
    one, next_draw = BetaPolicy(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(next_draw, torch.rand(1))
    for ours, theirs in zip(one.parameters(), BetaPolicy().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_beta_policy_goes_where_the_reward_is():
    torch.manual_seed(0)
    sampler = built(BetaPolicy(grid=4, chosen=1, every=1, learning_rate=1e-3), torch.tensor([0.9, 0.7, 0.4, 0.1]))
    clean = torch.rand(32, 3, 8, 8)
    sampler.seen = 3
    before = sampler.distribution(clean).mean.mean().item()
    for _ in range(25):
        sampler.draw(clean)
        sampler._improve(clean, sampler._places_drawn * 0.1)
        sampler.seen += 1
    assert before == pytest.approx(0.5)
    assert sampler.distribution(clean).mean.mean().item() > 0.65


@pytest.mark.parametrize(
    "make",
    [
        UniformTimesteps,
        SpeeD,
        lambda: LossSecondMoment(history=1),
        AdaptiveTimesteps,
        lambda: BetaPolicy(grid=4, chosen=1, every=1),
    ],
)
def test_a_sampler_goes_on_from_its_saved_state(make):
    torch.manual_seed(0)
    clean = torch.rand(8, 3, 8, 8)
    network = Network()

    def step(sampler):
        timesteps, weights = sampler.draw(clean)
        sampler.update(timesteps, 0.1 + timesteps / 4)
        network.step = 0.0
        sampler.before_step(network, clean)
        network.step = 0.1
        sampler.after_step(network, clean)
        return timesteps, weights

    alphas_cumprod = torch.tensor([0.9, 0.7, 0.69999, 0.69998])
    one = built(make(), alphas_cumprod)
    for _ in range(5):
        step(one)
    other = built(make(), alphas_cumprod)
    # as a checkpoint has it
    with tempfile.TemporaryFile() as file:
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    found = []
    for sampler in (one, other):
        torch.manual_seed(1)
        found.append([step(sampler) for _ in range(3)])
    for ours, theirs in zip(*found, strict=True):
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[1].tolist() == theirs[1].tolist()


def test_when_a_sampler_looks_at_the_network():
    assert [UniformTimesteps().is_due(step) for step in range(3)] == [False] * 3
    assert [step for step in range(100) if BetaPolicy().is_due(step)] == [39, 79]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LossSecondMoment(history=0), "history is 0"),
        (lambda: AdaptiveTimesteps(even_share=0), "even_share 0 and levels 24; give shares"),
        (lambda: BetaPolicy(queue=2), "queue 2; give 1 step or more"),
        (lambda: built(BetaPolicy(), torch.tensor([0.9, 0.1])), "grid is 100, but there are 2 timesteps"),
    ],
)
def test_bad_settings_of_samplers(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
