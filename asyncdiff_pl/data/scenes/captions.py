"""Captions: five wordings of every scene, each of which names every attribute."""

from __future__ import annotations

import functools
from itertools import product
from typing import NamedTuple

from asyncdiff_pl.data.scenes.attributes import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    Scenes,
)

NUM_WORDINGS = 5


class Thing(NamedTuple):
    """What captions say of one object: indices into `SHAPES`, `COLOURS`, `SIZES` and `MATERIALS`."""

    shape: int
    colour: int
    size: int
    material: int


class Content(NamedTuple):
    """What captions say of one scene.

    Args:
        things: The objects, the main one first.
        relations: Where the main object is, seen from each of the others: index into `RELATIONS`.
        background: Index into `BACKGROUNDS`.
        background_colour: Index into `BACKGROUND_COLOURS`.
    """

    things: tuple[Thing, ...]
    relations: tuple[int, ...]
    background: int
    background_colour: int


RELATIONS = ("left", "right", "above", "below")

# one column for each wording
_SHAPE_WORDS = {
    "circle": ("circle", "ball", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "square block", "square"),
    "triangle": ("triangle", "triangle", "triangle", "triangle", "triangle"),
    "star": ("star", "star", "star", "five-pointed star", "star"),
    "heart": ("heart", "heart", "heart", "heart shape", "heart"),
    "ring": ("ring", "donut", "ring", "round ring", "donut"),
    "cross": ("cross", "plus sign", "cross", "cross", "plus sign"),
    "crescent": ("crescent", "half moon", "crescent", "crescent shape", "half moon"),
}
_SIZE_WORDS = {
    "small": ("small", "little", "small", "tiny", "little"),
    "medium": ("medium-sized", "medium", "medium", "mid-sized", "medium"),
    "large": ("large", "big", "large", "huge", "big"),
}
_MATERIAL_WORDS = {
    "matte": ("matte", "dull", "plain", "matte", "a dull surface"),
    "glossy": ("glossy", "shiny", "polished", "glossy", "a shiny surface"),
    "metallic": ("metallic", "chrome", "metal", "metallic", "a metal surface"),
    "striped": ("striped", "striped", "stripy", "striped", "stripes"),
    "dotted": ("dotted", "spotted", "polka-dot", "dotted", "dots"),
    "outlined": ("outlined", "flat cartoon", "black-edged", "outlined", "a thick black outline"),
}
# the colour goes where the braces are
_BACKGROUND_WORDS = {
    "gradient": (
        "a smooth {} gradient",
        "a plain backdrop in shades of {}",
        "a plain {} background",
        "a {} backdrop that fades",
        "soft {} shading",
    ),
    "spotlight": (
        "a {} wall lit by a spotlight",
        "a spot of light on something {}",
        "a {} spotlight",
        "a dark {} wall with a glow",
        "a lamp shining on a {} wall",
    ),
    "stripes": (
        "a wall with {} stripes",
        "striped wallpaper in {}",
        "{} stripes",
        "a {} striped wall",
        "diagonal {} bands",
    ),
    "checkered floor": (
        "a {} checkered floor",
        "a chessboard floor in {} and white",
        "{} and white floor tiles",
        "a room with {} checks on the floor",
        "a {} and white tiled floor",
    ),
    "hills": (
        "rolling {} hills",
        "a landscape of hills in {}",
        "{} hills",
        "a valley of {} hills",
        "gentle {} hills under the sky",
    ),
    "mountains": (
        "{} mountains",
        "a mountain range in {}",
        "{} peaks",
        "steep {} mountains",
        "pointed {} mountains under the sky",
    ),
    "sea": (
        "a {} sea with waves",
        "ocean water in {}",
        "the {} sea",
        "a wavy {} ocean",
        "{} water and waves",
    ),
    "sunset": (
        "a {} sunset",
        "an evening sun in a sky of {}",
        "a setting sun in {}",
        "a sunset over water in {}",
        "the low sun in the {} evening",
    ),
    "clouds": (
        "a cloudy {} sky",
        "clouds in a sky of {}",
        "a {} sky full of clouds",
        "soft clouds on {}",
        "a {} sky with drifting clouds",
    ),
    "night sky": (
        "a {} night sky with stars",
        "a starry night in {}",
        "a {} starry sky",
        "stars in the dark {} night",
        "a {} night full of stars",
    ),
    "blurred lights": (
        "blurred {} lights",
        "blurry lights in {}",
        "a {} bokeh background",
        "soft round {} lights",
        "out-of-focus {} lamps",
    ),
}
_RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_COUNT_WORDS = ("", "One object", "Two objects", "Three objects")


@functools.cache
def _thing_phrases() -> tuple[dict[Thing, str], ...]:
    """For each wording the words for each thing, with an article."""
    tables: tuple[dict[Thing, str], ...] = tuple({} for _ in range(NUM_WORDINGS))
    kinds = product(enumerate(SHAPES), enumerate(COLOURS), enumerate(SIZES), enumerate(MATERIALS))
    for (s, shape), (c, colour), (z, size), (m, material) in kinds:
        shapes, sizes, materials = _SHAPE_WORDS[shape], _SIZE_WORDS[size], _MATERIAL_WORDS[material]
        phrases = (
            f"a {sizes[0]} {materials[0]} {colour} {shapes[0]}",
            f"a {materials[1]} {shapes[1]} that is {sizes[1]} and {colour}",
            f"a {colour} {shapes[2]}, {sizes[2]} and {materials[2]}",
            f"a {sizes[3]} {shapes[3]} in {materials[3]} {colour}",
            f"a {sizes[4]} {colour} {shapes[4]} with {materials[4]}",
        )
        for table, phrase in zip(tables, phrases, strict=True):
            table[Thing(s, c, z, m)] = "an" + phrase[1:] if phrase[2] in "aeiou" else phrase
    return tables


@functools.cache
def _background_phrases() -> tuple[dict[tuple[int, int], str], ...]:
    """For each wording the words for each kind of background in each colour."""
    tables: tuple[dict[tuple[int, int], str], ...] = tuple({} for _ in range(NUM_WORDINGS))
    for (b, kind), (c, colour) in product(enumerate(BACKGROUNDS), enumerate(BACKGROUND_COLOURS)):
        for table, template in zip(tables, _BACKGROUND_WORDS[kind], strict=True):
            vowel = template.startswith("a {}") and colour[0] in "aeiou"
            table[b, c] = ("an" + template[1:] if vowel else template).format(colour)
    return tables


def contents(scenes: Scenes) -> list[Content]:
    """What captions say of each scene, as plain numbers."""
    offset = scenes.position[:, :1] - scenes.position[:, 1:]
    # 0 to 3: left, right, above, below, by the longer of the two ways
    sideways = offset[..., 0].abs() >= offset[..., 1].abs()
    across, down = (offset[..., 0] > 0).long(), 2 + (offset[..., 1] > 0).long()
    relations = across.where(sideways, down).tolist()
    rows = zip(
        scenes.number.tolist(),
        scenes.shape.tolist(),
        scenes.colour.tolist(),
        scenes.size.tolist(),
        scenes.material.tolist(),
        scenes.background.tolist(),
        scenes.background_colour.tolist(),
        relations,
        strict=True,
    )
    return [
        Content(
            tuple(map(Thing, shape[:number], colour[:number], size[:number], material[:number])),
            tuple(relation[: number - 1]),
            background,
            background_colour,
        )
        for number, shape, colour, size, material, background, background_colour, relation in rows
    ]


def caption(content: Content, wording: int) -> str:
    """Words a scene.

    Args:
        content: What is to be said.
        wording: Which way to say it, 0 to 4; ways 0 to 2 tell where the objects are.
    """
    phrases = _thing_phrases()[wording]
    main, *others = [phrases[thing] for thing in content.things]
    behind = _background_phrases()[wording][content.background, content.background_colour]
    if wording < 3 and others:
        words = [_RELATION_WORDS[RELATIONS[relation]][wording] for relation in content.relations]
        if len(others) == 2 and words[0] == words[1]:
            where = f"{words[0]} {others[0]} and {others[1]}"
        else:
            where = " and ".join(f"{word} {other}" for word, other in zip(words, others, strict=True))
        if wording == 0:
            return f"{_capital(main)} {where} in front of {behind}."
        if wording == 1:
            return f"There is {main}, {where}, with {behind} behind."
        return f"{_capital(behind)} behind {main}, {where}."
    together = main if not others else f"{', '.join([main, *others[:-1]])} and {others[-1]}"
    if wording == 0:
        return f"{_capital(main)} in front of {behind}."
    if wording == 1:
        return f"There is {main}, with {behind} behind."
    if wording == 2:
        return f"{_capital(behind)} behind {main}."
    if wording == 3:
        return f"{_COUNT_WORDS[len(content.things)]} before {behind}: {together}."
    return f"{_capital(together)} against {behind}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def captions(scenes: Scenes) -> list[tuple[str, ...]]:
    """Five captions of each scene.

    Args:
        scenes: B scenes, best on the CPU.

    Returns:
        B tuples of five sentences; each names shape, colour, size and material of every object, and the background
        and its colour. The first three also tell where objects are.
    """
    return [tuple(caption(content, wording) for wording in range(NUM_WORDINGS)) for content in contents(scenes)]
