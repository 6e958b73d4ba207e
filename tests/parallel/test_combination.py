"""What a pipeline makes of the denoiser's estimates, found from an example: guidance, halves that are both stepped."""

import pytest
import torch

from asyncdiff_pl.parallel.steps.place import Place
from asyncdiff_pl.parallel.time.combination import Combination

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
