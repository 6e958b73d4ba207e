"""Noise by seed: the generator's published numbers, and what a picture's noise depends on."""

import pytest
import torch

from asyncdiff_pl.sampling.seeded_noise import philox, seeded_normal

ONES = 0xFFFFFFFF
# from the authors' Random123, kat_vectors: counter, key and result of philox4x32 with 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_numbers(counter, key, expected):
    found = philox(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))
    assert tuple(int(word) for word in found) == expected


def test_noise_depends_on_its_seed_and_its_draw_alone():
    seeds = torch.tensor([3, 2**62 + 5, 0, 5])
    together = seeded_normal(seeds, 4, (3, 5, 5))
    for place, seed in enumerate(seeds):
        assert torch.equal(seeded_normal(seed[None], 4, (3, 5, 5))[0], together[place])
    # the seed's upper half counts as well
    assert not torch.equal(together[1], together[3])
    assert not torch.equal(seeded_normal(seeds, 5, (3, 5, 5)), together)


def test_noise_is_standard_normal_and_independent():
    noise = torch.stack([seeded_normal(torch.arange(100), draw, (3, 16, 16)) for draw in range(2)]).flatten(2)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert (noise**4).mean() == pytest.approx(3, abs=0.1)
    share = (noise.abs() < 1).float().mean()
    assert share == pytest.approx(0.6827, abs=0.005)
    # neighbouring seeds, draws and places
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[1], noise[0]), (noise[..., 1:], noise[..., :-1])):
        assert (a * b).mean() == pytest.approx(0, abs=0.01)
