"""Solving all steps together gives what one step after the other gives, for each sample on its own."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from mixture import problem

from asyncdiff_pl.sampling import picard, sequential, triangular_anderson

SMALL = (3, 8, 8)
NUMBER = 16


class Recorded:
    """An estimate that keeps what it was asked for."""

    def __init__(self, estimate):
        self.estimate = estimate
        self.calls = []

    def __call__(self, states, timesteps, samples, steps):
        assert len(states) == len(timesteps) == len(samples) == len(steps)
        self.calls.append((samples, steps, timesteps.tolist(), states.clone()))
        return self.estimate(states, timesteps, samples, steps)


class Uneven:
    """The second sample's estimates are linear in the state: it takes another number of iterations."""

    def __init__(self, estimate):
        self.estimate = estimate

    def __call__(self, states, timesteps, samples, steps):
        second = torch.tensor(samples).view(-1, 1, 1, 1) == 1
        return torch.where(second, states / 20, self.estimate(states, timesteps, samples, steps))


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


SOLVERS = [
    (triangular_anderson, {}),
    (triangular_anderson, {"order": 1, "memory": 1}),
    (triangular_anderson, {"order": 4, "memory": 3, "window": 5}),
    (triangular_anderson, {"order": 30, "memory": 6, "window": 30}),
    (picard, {}),
    (picard, {"window": 5}),
]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("solver", "settings"), SOLVERS)
def test_a_tolerance_of_zero_gives_the_sequential_result(solver, settings, eta):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        estimate, latents, coefficients, noises = problem(NUMBER, eta, 2, SMALL, dtype)
        expected = sequential(estimate, latents, coefficients, noises=noises)
        found = solver(estimate, latents, coefficients, noises=noises, tolerance=0, **settings)
        assert found.converged
        assert found.latents.dtype == found.trajectory.dtype == dtype
        assert max(found.iterations) <= NUMBER
        assert distance(found.latents, expected.latents) < limit
        assert distance(found.trajectory, expected.trajectory) < limit


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_issues_mixture_at_a_small_tolerance(eta):
    estimate, latents, coefficients, noises = problem(50, eta, 1)
    expected = sequential(estimate, latents, coefficients, noises=noises).latents
    for solver, tolerance in ((triangular_anderson, 1e-6), (picard, 1e-6)):
        found = solver(estimate, latents, coefficients, noises=noises, tolerance=tolerance)
        assert distance(found.latents, expected) < 1e-4


def test_a_looser_tolerance_is_faster_and_less_exact():
    estimate, latents, coefficients, _ = problem(50, 0.0, 1)
    expected = sequential(estimate, latents, coefficients).latents
    for solver, tolerances in ((triangular_anderson, (1e-1, 1e-2, 1e-3)), (picard, (1.0, 0.1, 0.01))):
        found = [solver(estimate, latents, coefficients, tolerance=tolerance) for tolerance in tolerances]
        iterations = [max(one.iterations) for one in found]
        distances = [distance(one.latents, expected) for one in found]
        assert iterations == sorted(set(iterations))
        assert distances == sorted(set(distances), reverse=True)
        assert distances[-1] < 1e-2


@pytest.mark.parametrize(("solver", "settings"), SOLVERS)
def test_samples_converge_on_their_own(solver, settings):
    estimate, latents, coefficients, noises = problem(NUMBER, 1.0, 3, SMALL)
    together = solver(estimate, latents, coefficients, noises=noises, **settings)
    for index in range(3):
        one = slice(index, index + 1)
        alone = solver(estimate, latents[one], coefficients, noises=noises[one], **settings)
        torch.testing.assert_close(together.latents[one], alone.latents, rtol=1e-10, atol=1e-10)
        assert [together.iterations[index], together.evaluations[index]] == [*alone.iterations, *alone.evaluations]
        torch.testing.assert_close(together.residuals[index], alone.residuals[0], equal_nan=True)


@pytest.mark.parametrize(("solver", "settings"), [SOLVERS[0], SOLVERS[2], SOLVERS[5]])
def test_only_what_needs_evaluation_is_evaluated_and_all_of_it_is_told(solver, settings):
    estimate, latents, coefficients, _ = problem(NUMBER, 0.0, 2, SMALL)
    recorded, told = Recorded(Uneven(estimate)), []
    found = solver(recorded, latents, coefficients, callback=told.append, **settings)
    window = settings.get("window", NUMBER)
    assert [iteration.number for iteration in told] == [*range(1, max(found.iterations) + 1)]
    finished = [NUMBER, NUMBER]
    for (samples, steps, timesteps, states), iteration in zip(recorded.calls, told, strict=True):
        assert (samples, steps) == (iteration.samples, iteration.steps)
        assert timesteps == coefficients.timesteps[steps].tolist()
        for sample in (0, 1):
            own = [step for owner, step in zip(samples, steps, strict=True) if owner == sample]
            assert own == [*range(max(finished[sample] - window, 0), finished[sample])]
            assert iteration.finished[sample] < finished[sample] or not own
        finished = iteration.finished
        assert len(iteration.residuals) == len(states)
    assert finished == found.finished == [0, 0]
    assert sum(found.evaluations) == sum(len(samples) for samples, *_ in recorded.calls)
    assert found.iterations[0] != found.iterations[1]
    for sample, residuals in enumerate(found.residuals):
        assert residuals.shape == (found.iterations[sample], NUMBER)
        assert (~residuals.isnan()).sum() == found.evaluations[sample]
    torch.testing.assert_close(torch.stack(iteration.trajectories), found.trajectory)


def test_picard_slides_past_what_changes_less_than_ddpms_noise():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(NUMBER)
    estimate, latents, coefficients, _ = problem(NUMBER, 0.0, 1, SMALL)
    told = []
    picard(estimate, latents, coefficients, window=6, tolerance=0.3, callback=told.append)
    # of DDPM's step from each state; there is none from state 0
    variances = [scheduler._get_variance(time, time - 1000 // NUMBER) for time in scheduler.timesteps.flip(0)]
    limits = [float("inf")] + [0.3 * float(variance) ** 0.5 for variance in variances]
    for one in told:
        over = [step for step, residual in zip(one.steps, one.residuals, strict=True) if residual > limits[step]]
        assert one.finished == [max(over, default=one.steps[0])]
    assert any(before.steps[-1] - after.steps[-1] > 1 for before, after in itertools.pairwise(told))


@pytest.mark.parametrize("solver", [triangular_anderson, picard])
def test_max_iterations_counts_evaluations(solver):
    estimate, latents, coefficients, _ = problem(NUMBER, 0.0, 2, SMALL)
    for limit in (1, 3):
        recorded = Recorded(estimate)
        found = solver(recorded, latents, coefficients, tolerance=0, max_iterations=limit)
        assert len(recorded.calls) == limit
        assert found.iterations == [limit, limit]
        assert found.finished == [NUMBER - limit] * 2
        assert not found.converged


def test_one_step():
    estimate, latents, coefficients, _ = problem(1, 0.0, 1, SMALL)
    expected = sequential(estimate, latents, coefficients).latents
    for solver in (triangular_anderson, picard):
        found = solver(estimate, latents, coefficients)
        assert found.iterations == found.evaluations == [1]
        torch.testing.assert_close(found.latents, expected)


def test_videos():
    estimate, latents, coefficients, noises = problem(NUMBER, 1.0, 2, (2, 3, 4, 6))
    expected = sequential(estimate, latents, coefficients, noises=noises).latents
    for solver in (triangular_anderson, picard):
        found = solver(estimate, latents, coefficients, noises=noises, window=6, tolerance=1e-6)
        assert found.trajectory.shape == (2, NUMBER + 1, 2, 3, 4, 6)
        assert distance(found.latents, expected) < 1e-4


def test_without_the_safeguard_states_must_converge_by_themselves():
    estimate, latents, coefficients, _ = problem(50, 0.0)
    expected = sequential(estimate, latents, coefficients).latents
    found = triangular_anderson(estimate, latents, coefficients, safeguard=False)
    assert found.converged
    assert distance(found.latents, expected) < 1e-2
    for residuals in found.residuals:
        last = torch.stack([column[~column.isnan()][-1] for column in residuals.T])
        assert (last <= 1e-3).all()


def changed(estimate, by):
    """Another prompt: the mixture's estimate, a little off."""
    return lambda states, *which: estimate(states, *which) + by * states.roll(1, -1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("solver", [triangular_anderson, picard])
def test_from_a_trajectory(solver, eta):
    estimate, latents, coefficients, noises = problem(50, eta, 1)
    first = solver(estimate, latents, coefficients, noises=noises).trajectory
    before = first.clone()
    other = changed(estimate, 0.01)
    expected = sequential(other, latents, coefficients, noises=noises).latents
    cold = solver(other, latents, coefficients, noises=noises)
    warm = solver(other, latents, coefficients, noises=noises, initial_trajectory=first)
    assert warm.iterations < cold.iterations
    assert distance(warm.latents, expected) < 0.004 < distance(first[:, 0], expected)
    assert torch.equal(first, before)


@pytest.mark.parametrize("solver", [triangular_anderson, picard])
def test_a_trajectory_of_other_noise_is_only_a_start(solver):
    estimate, latents, coefficients, _ = problem(NUMBER, 0.0, 2, SMALL)
    first = solver(estimate, latents, coefficients).trajectory
    expected = sequential(estimate, latents.flip(0), coefficients).latents
    found = solver(estimate, latents.flip(0), coefficients, tolerance=0, initial_trajectory=first)
    assert distance(found.latents, expected) < 1e-10


@pytest.mark.parametrize("solver", [triangular_anderson, picard])
def test_part_of_a_trajectory(solver):
    estimate, latents, coefficients, noises = problem(NUMBER, 1.0, 2, SMALL)
    first = solver(estimate, latents, coefficients, noises=noises).trajectory
    other = changed(estimate, 0.1)
    part = solver(other, latents, coefficients, noises=noises, tolerance=0, initial_trajectory=first, variation_steps=6)
    assert torch.equal(part.trajectory[:, 6:], first[:, 6:])
    assert part.iterations == [6, 6]
    state = first[:, 6]
    for step in reversed(range(6)):
        found = other(state, coefficients.timesteps[[step, step]], [0, 1], [step, step])
        state = coefficients.state_factors[step] * state + coefficients.estimate_factors[step] * found
        state = state + coefficients.noise_deviations[step] * noises[:, step]
    torch.testing.assert_close(part.latents, state)


@pytest.mark.parametrize("solver", [triangular_anderson, picard])
def test_a_trajectory_that_has_almost_converged_is_not_thrown_off(solver):
    estimate, latents, coefficients, _ = problem(50, 0.0, 1)
    first = solver(estimate, latents, coefficients).trajectory
    for by in (0.0, 0.003):
        other = changed(estimate, by)
        expected = sequential(other, latents, coefficients).latents
        found = solver(other, latents, coefficients, initial_trajectory=first)
        assert max(found.iterations) <= 5
        assert distance(found.latents, expected) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 0}, "order is 0; give 1 or more"),
        ({"memory": 0}, "memory is 0; give 1 or more"),
        ({"window": 0}, "window is 0; give 1 or more"),
        ({"max_iterations": 0}, "max_iterations is 0; give 1 or more"),
        ({"tolerance": -1.0}, "tolerance is -1.0; give 0"),
        ({"variation_steps": 3}, "variation_steps is 3, but there is no initial_trajectory"),
        ({"initial_trajectory": torch.zeros(2, 9, *SMALL)}, r"is \(2, 9, 3, 8, 8\), but 16 steps.*need \(2, 17, 3, 8"),
        (
            {"initial_trajectory": torch.zeros(2, NUMBER + 1, *SMALL), "variation_steps": 17},
            "variation_steps is 17; give one from 1 to the number of steps, 16",
        ),
    ],
)
def test_bad_settings(settings, message):
    estimate, latents, coefficients, _ = problem(NUMBER, 0.0, 2, SMALL)
    with pytest.raises(ValueError, match=message):
        triangular_anderson(estimate, latents, coefficients, **settings)
