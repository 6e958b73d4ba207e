"""Hard negatives: captions of scenes that are almost, but not quite, the given ones."""

from __future__ import annotations

from asyncdiff_pl.data.scenes.attributes import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    Scenes,
)
from asyncdiff_pl.data.scenes.captions import NUM_WORDINGS, Content, Thing, caption, contents

_LENGTHS = (len(SHAPES), len(COLOURS), len(SIZES), len(MATERIALS))
# shape, size and material of one object, the background and its colour; then as many colours as are always free
MAX_CHANGES = sum(_LENGTHS) - 4 + len(BACKGROUNDS) - 1 + len(BACKGROUND_COLOURS) - 1


def changed_captions(scenes: Scenes, number: int, wording: int, seed: int = 0) -> list[list[str]]:
    """Captions that differ from the true one in exactly one attribute.

    Args:
        scenes: B scenes, best on the CPU.
        number: Captions of each scene, all different from one another and from the true one, 0 to `MAX_CHANGES`.
        wording: Which of the five wordings they have, 0 to 4.
        seed: Another seed makes other choices.

    Returns:
        B lists of `number` sentences, of the `changed_contents`.

    Raises:
        ValueError: `number` or `wording` is out of range.
    """
    if not 0 <= wording < NUM_WORDINGS:
        raise ValueError(f"wording is {wording}; give 0 to {NUM_WORDINGS - 1}.")
    return [[caption(change, wording) for change in changes] for changes in changed_contents(scenes, number, seed)]


def changed_contents(scenes: Scenes, number: int, seed: int = 0) -> list[list[Content]]:
    """What the changed captions say of each scene.

    What changes is the shape, colour, size or material of one object, the background's kind or its colour, each as
    likely as the others, for as long as it has further values. A colour never becomes that of another object.

    Args:
        scenes: B scenes, best on the CPU.
        number: Changes of each scene, all different, 0 to `MAX_CHANGES`.
        seed: Another seed makes other choices.

    Returns:
        B lists of `number` contents.

    Raises:
        ValueError: `number` is out of range.
    """
    if not 0 <= number <= MAX_CHANGES:
        raise ValueError(f"number is {number}, but a scene has {MAX_CHANGES} sure changes; give 0 to {MAX_CHANGES}.")
    rows = zip(scenes.index.tolist(), contents(scenes), strict=True)
    return [_changes(content, number, _Dice(index, seed)) for index, content in rows]


class _Dice:
    """Small numbers from a scene's index and a seed; making one costs nothing, unlike `random.Random`."""

    def __init__(self, index: int, seed: int) -> None:
        self._state = (index * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & (1 << 64) - 1

    def roll(self, sides: int) -> int:
        """A number from 0 to `sides` - 1."""
        # Knuth's MMIX generator; its upper bits are the random ones
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & (1 << 64) - 1
        return (self._state >> 33) % sides


def _changes(content: Content, number: int, dice: _Dice) -> list[Content]:
    """Different scenes, each with one attribute changed."""
    used = {thing.colour for thing in content.things}
    seen: set[tuple[int, int]] = set()
    found = []
    slots = 4 * len(content.things) + 2
    while len(found) < number:
        slot = dice.roll(slots)
        which, attribute = divmod(slot, 4)
        if slot == slots - 2:
            value = dice.roll(len(BACKGROUNDS))
            change = content._replace(background=value)
        elif slot == slots - 1:
            value = dice.roll(len(BACKGROUND_COLOURS))
            change = content._replace(background_colour=value)
        else:
            value = dice.roll(_LENGTHS[attribute])
            if attribute == Thing._fields.index("colour") and value in used:
                continue
            thing = list(content.things[which])
            thing[attribute] = value
            things = list(content.things)
            things[which] = Thing(*thing)
            change = content._replace(things=tuple(things))
        if change != content and (slot, value) not in seen:
            seen.add((slot, value))
            found.append(change)
    return found
