"""Where a step's latents are among what the denoiser is given, found from an example."""

import pytest
import torch

from asyncdiff_pl.parallel.steps.place import Place

LATENTS = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4).add(1)
MORE = torch.full((4, 2, 4), -1.0)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (LATENTS, Place(2, 1)),
        (torch.cat([LATENTS] * 2), Place(2, 2)),
        (torch.cat([torch.cat([LATENTS] * 2), MORE], 1), Place(2, 2, 1, 0, 3)),
        (torch.cat([MORE, torch.cat([LATENTS] * 2)], 1), Place(2, 2, 1, 2, 3)),
        (torch.cat([LATENTS[:1]] * 2), Place(1, 2)),
        (LATENTS.half(), Place(2, 1)),
        # other latents, another order, less than all
        (LATENTS * 1.001, None),
        (LATENTS.repeat_interleave(2, 0), None),
        (LATENTS[:, :2], None),
        (LATENTS[0], None),
        (LATENTS * torch.nan, None),
    ],
)
def test_places(given, place):
    assert Place.find(given, LATENTS) == place
    if place is not None:
        other = LATENTS.flip(0) * 2
        filled = place.filled(given, other)
        assert filled.stride() == given.stride()
        assert Place.find(filled, other) == place
        assert place.differs(given, other)
        assert torch.equal(place.filled(filled, LATENTS), given)
