"""All ranks in one process against the original implementation's latents; the ranks themselves: test_ranks.py."""

import pytest
import reference


@pytest.mark.skipif(not reference.latents(), reason="the reference latents are not here")
def test_the_reference_is_for_these_weights():
    keys = reference.keys()
    assert len(keys) >= 18
    for name in {key.split("/")[0] for key in keys}:
        total = sum(weight.abs().double().sum() for weight in reference.denoiser(name).parameters())
        assert float(total) == pytest.approx(float(reference.latents()[f"{name}/weights_sum"]), rel=1e-6)


@pytest.mark.parametrize("key", reference.keys())
def test_simulation_gives_what_the_original_gave(key):
    name = key.split("/")[0]
    found = reference.simulated(key) - reference.sequential(name)
    expected = reference.latents()[key] - reference.latents()[f"{name}/sequential"]
    assert float((found - expected).norm() / expected.norm()) < reference.BOUND
