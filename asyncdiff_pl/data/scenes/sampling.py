"""Scenes by index: every number of a scene is a hash of its split and its index."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import BACKGROUNDS, COLOURS, MATERIALS, RADII, SHAPES, SIZES, Scenes
from asyncdiff_pl.data.scenes.motion import PATHS
from asyncdiff_pl.data.scenes.numbers import Numbers, Split
from asyncdiff_pl.data.scenes.palettes import clashes, palette_counts, palette_names

# places are compared in whole numbers of these, so that the comparison comes out alike on every device
_PLACES = 4096
_TRIALS = 64


@functools.cache
@torch.autocast("cpu", enabled=False)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    radii = torch.tensor(RADII)
    return tuple(table.to(device) for table in (palette_counts(), palette_names(), clashes(), radii))


@functools.cache
@torch.autocast("cpu", enabled=False)
def _indices(chosen: tuple[str, ...], every: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([every.index(name) for name in chosen], device=device)


def _check_chosen(what: str, chosen: Sequence[str], every: Sequence[str]) -> tuple[str, ...]:
    """Some of the names of an attribute.

    Args:
        what: What the setting is called.
        chosen: Names, each once.
        every: All that there are.

    Raises:
        ValueError: None is given, one twice, or one that there is not.
    """
    unknown = [name for name in chosen if name not in every]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{what} is {list(chosen)}; give some of {', '.join(every)}, each once.")
    return tuple(chosen)


def sample_scenes(
    index: Tensor,
    split: Split = "train",
    *,
    max_objects: int = 3,
    sizes: Sequence[str] = SIZES,
    backgrounds: Sequence[str] = BACKGROUNDS,
    device: torch.device | str | None = None,
) -> Scenes:
    """Makes the scenes of the given indices.

    Scene i of a split is the same in every batch, in every process and on every device (coordinates up to rounding).

    Args:
        index: Indices from 0 up, int64, shape (B,).
        split: Splits share no scene.
        max_objects: Largest number of objects of a scene, 1 to 3; another number gives other scenes.
        sizes: Sizes that objects have, of `SIZES`.
        backgrounds: Backgrounds that scenes have, of `BACKGROUNDS`.
        device: Where the scenes are made; None takes the device of `index`.

    Returns:
        B scenes, with room for `max_objects` objects each.

    Raises:
        ValueError: `max_objects`, the split, a size or a background is out of range, or large objects have no room.
    """
    if not 1 <= max_objects <= 3:
        raise ValueError(f"max_objects is {max_objects}; give 1, 2 or 3.")
    sizes = _check_chosen("sizes", sizes, SIZES)
    backgrounds = _check_chosen("backgrounds", backgrounds, BACKGROUNDS)
    smaller = tuple(name for name in sizes if name != SIZES[2])
    if max_objects > 1 and not smaller:
        raise ValueError(f"sizes is {list(sizes)} and max_objects {max_objects}; give a smaller size too, or 1 object.")
    index = index.to(device if device is not None else index.device, torch.int64)
    numbers = Numbers(index, split)
    counts, names, clash, radii = _tables(index.device)

    # of ten scenes with up to three objects, four have one, three have two and three have three
    of_ten = {1: (10, 10), 2: (5, 10), 3: (4, 7)}[max_objects]
    die = numbers.choice(10)
    number = 1 + (die >= of_ten[0]).long() + (die >= of_ten[1]).long()

    background = _indices(backgrounds, BACKGROUNDS, index.device)[numbers.choice(len(backgrounds))]
    palette = numbers.bits() % counts[background]
    # colours in random order, those that would not stand out last; the top bits of the key are what orders them
    order = numbers.bits(len(COLOURS)) + (clash[background, palette].long() << 32)
    colour = order.argsort(dim=1)[:, :max_objects]
    shape = numbers.choice(len(SHAPES), max_objects)
    material = numbers.choice(len(MATERIALS), max_objects)
    size = _indices(sizes, SIZES, index.device)[numbers.choice(len(sizes), max_objects)]
    # two large objects leave no room for a third
    crowded = (size == 2).long().cumsum(1) > 1
    small = _indices(smaller or sizes, SIZES, index.device)[numbers.choice(len(smaller or sizes), max_objects)]
    size = torch.where(crowded & (number >= 2)[:, None], small, size)
    radius = radii[size] * numbers.uniform(0.95, 1.05, max_objects)
    position = _places(numbers, radii[size], number)

    tempo = numbers.uniform(0, 1)
    # one scene in eight stands nearly still; the others are slow more often than fast. What moves twice as fast melts
    # in a denoiser as small as tiny-svd
    tempo = torch.where(numbers.choice(8) == 0, 0.02 * tempo, 0.04 + 0.51 * tempo**1.5)[:, None]
    direction = numbers.uniform(0, 2 * torch.pi, max_objects)
    speed = 0.9 * tempo * numbers.uniform(0.4, 1, max_objects)
    velocity = speed[..., None] * torch.stack([direction.cos(), direction.sin()], -1)
    turns = numbers.choice(3, max_objects) > 0
    spin = tempo * numbers.uniform(-2.2, 2.2, max_objects) * turns
    pulses = numbers.choice(3, max_objects) == 0
    pulse = torch.stack(
        [numbers.uniform(0.04, 0.13, max_objects) * pulses, tempo * numbers.uniform(0.4, 1.6, max_objects)], -1
    )

    camera = numbers.choice(10)
    heading = numbers.uniform(-1, 1, 2)
    # mostly sideways; a tensor of these two numbers would make a GPU wait
    heading = torch.stack([0.8 * heading[:, 0], 0.06 * heading[:, 1]], -1)
    pan = heading * tempo * ((camera >= 5) & (camera < 8))[:, None]
    sway = torch.stack([numbers.uniform(0.05, 0.14) * (camera >= 8), tempo[:, 0] * numbers.uniform(0.3, 0.9)], -1)
    return Scenes(
        index=index,
        number=number,
        shape=shape,
        colour=colour,
        size=size,
        material=material,
        background=background,
        palette=palette,
        background_colour=names[background, palette],
        position=position,
        radius=radius,
        path=numbers.choice(len(PATHS), max_objects),
        velocity=velocity,
        phase=numbers.uniform(0, 1, max_objects),
        angle=numbers.uniform(-0.45, 0.45, max_objects),
        spin=spin,
        pulse=pulse,
        pan=pan,
        sway=sway,
        horizon=numbers.uniform(0.02, 0.3),
        offset=numbers.uniform(0, 1, 4),
    )


def _places(numbers: Numbers, radius: Tensor, number: Tensor) -> Tensor:
    """Centres at time 0, (B, O, 2): of some random placings the first without overlap, else the one with the least."""
    max_objects = radius.shape[1]
    whole = (radius * _PLACES).round().long()
    room = (_PLACES * 0.97 - whole).long()[:, None, :, None]
    places = numbers.bits(_TRIALS, max_objects, 2) % (2 * room + 1) - room
    free = torch.full((len(radius), _TRIALS), _PLACES, device=radius.device, dtype=torch.int64)
    for first in range(max_objects):
        for second in range(first + 1, max_objects):
            apart = (places[:, :, first] - places[:, :, second]).square().sum(-1)
            gap = apart - (whole[:, first] + whole[:, second]).square()[:, None]
            free = torch.where((number > second)[:, None], torch.minimum(free, gap), free)
    # earlier placings win among equals, so that no two are equal
    rank = free * _TRIALS - torch.arange(_TRIALS, device=radius.device)
    best = rank.argmax(1)[:, None, None, None].expand(-1, 1, max_objects, 2)
    return places.gather(1, best)[:, 0].float() / _PLACES
