import re

import pytest
import torch

from asyncdiff_pl.data.scenes import captions, changed_captions, sample_scenes
from asyncdiff_pl.data.scenes.attributes import BACKGROUND_COLOURS, COLOURS
from asyncdiff_pl.data.scenes.captions import NUM_WORDINGS, RELATIONS, Content, Thing, caption, contents
from asyncdiff_pl.data.scenes.changed_captions import MAX_CHANGES, _changes, _Dice

SCENES = sample_scenes(torch.arange(500), "test")


def test_five_captions_a_scene_and_hardly_any_twice():
    rows = captions(SCENES)
    assert len(rows) == 500 and {len(row) for row in rows} == {5}
    texts = [text for row in rows for text in row]
    assert len(set(texts)) > 0.99 * len(texts)
    for row in rows:
        assert len(set(row)) == 5


def test_captions_are_sentences_of_bearable_length():
    for row in captions(SCENES):
        for text in row:
            assert text[0].isupper() and text.endswith(".") and "  " not in text and " ," not in text
            assert not re.search(r"\ba [aeiou]", text, re.IGNORECASE), text
            assert not re.search(r"\ban [^aeiou]", text, re.IGNORECASE), text
            # words, hyphens and points, as a tokenizer that knows every word sees them
            assert len(re.findall(r"\w+|[^\w\s]", text)) <= 60, text


def test_every_caption_names_every_colour():
    for content, row in zip(contents(SCENES), captions(SCENES), strict=True):
        names = [COLOURS[thing.colour] for thing in content.things]
        for text in row:
            for name in [*names, BACKGROUND_COLOURS[content.background_colour]]:
                assert name in text.lower()


@pytest.mark.parametrize("wording", range(NUM_WORDINGS))
def test_different_attributes_give_different_captions(wording):
    """Changing any attribute to any other value changes the words."""
    content = Content((Thing(1, 2, 1, 3), Thing(0, 5, 0, 0)), (0,), 4, 1)
    texts = [caption(change, wording) for change in _changes(content, MAX_CHANGES, _Dice(0, 0))]
    assert len({*texts, caption(content, wording)}) == MAX_CHANGES + 1


def test_an_example_in_words():
    content = Content((Thing(3, 0, 2, 1), Thing(5, 5, 0, 0)), (RELATIONS.index("left"),), 4, 1)
    assert [caption(content, wording) for wording in range(NUM_WORDINGS)] == [
        "A large glossy red star to the left of a small matte blue ring in front of rolling green hills.",
        "There is a shiny star that is big and red, left of a dull donut that is little and blue, "
        "with a landscape of hills in green behind.",
        "Green hills behind a red star, large and polished, on the left of a blue ring, small and plain.",
        "Two objects before a valley of green hills: a huge five-pointed star in glossy red "
        "and a tiny round ring in matte blue.",
        "A big red star with a shiny surface and a little blue donut with a dull surface "
        "against gentle green hills under the sky.",
    ]


def test_relation_is_that_of_the_positions():
    scenes = sample_scenes(torch.arange(200))
    for content, place in zip(contents(scenes), scenes.position, strict=True):
        for relation, other in zip(content.relations, place[1:], strict=False):
            x, y = (place[0] - other).tolist()
            assert {"left": x < 0, "right": x > 0, "above": y < 0, "below": y > 0}[RELATIONS[relation]]


@pytest.mark.parametrize("number", [0, 1, 2, 20, MAX_CHANGES])
def test_changed_captions_are_all_different(number):
    few = SCENES[:60]
    rows = changed_captions(few, number, wording=2)
    for row, truth in zip(rows, captions(few), strict=True):
        assert len(row) == number == len(set(row))
        assert truth[2] not in row


def test_exactly_one_attribute_is_changed():
    kinds = set()
    for content in contents(SCENES[:100]):
        for change in _changes(content, 20, _Dice(1, 2)):
            pairs = [
                (f"{field}", old, new)
                for before, after in zip(content.things, change.things, strict=True)
                for field, old, new in zip(Thing._fields, before, after, strict=True)
            ]
            pairs += [(name, getattr(content, name), getattr(change, name)) for name in Content._fields[2:]]
            differing = [name for name, old, new in pairs if old != new]
            assert len(differing) == 1 and change.relations == content.relations
            assert len({thing.colour for thing in change.things}) == len(change.things)
            kinds.update(differing)
    assert kinds == {"shape", "colour", "size", "material", "background", "background_colour"}


def test_changes_depend_on_scene_and_seed_alone():
    alone = changed_captions(SCENES[9:10], 3, 0, seed=4)[0]
    assert alone == changed_captions(SCENES[:20], 3, 0, seed=4)[9]
    assert alone != changed_captions(SCENES[9:10], 3, 0, seed=5)[0]


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=f"number is 99, but a scene has {MAX_CHANGES} sure changes"):
        changed_captions(SCENES[:1], 99, 0)
    with pytest.raises(ValueError, match="wording is 5; give 0 to 4"):
        changed_captions(SCENES[:1], 1, 5)
