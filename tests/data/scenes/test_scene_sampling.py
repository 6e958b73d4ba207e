import pytest
import torch

from asyncdiff_pl.data.scenes import CLASS_NAMES, NUM_CLASSES, SPLITS, class_caption, class_of, sample_scenes
from asyncdiff_pl.data.scenes.attributes import BACKGROUNDS, COLOURS, MATERIALS, SHAPES, SIZES
from asyncdiff_pl.data.scenes.numbers import Numbers


def fields(scenes):
    return vars(scenes).items()


def test_hash_is_the_same_for_ever():
    numbers = Numbers(torch.tensor([0, 1, 123456789]), "train")
    assert numbers.bits().tolist() == STORED
    assert numbers.bits(2)[1].tolist() == STORED_SECOND


# trained weights know these scenes: a change of the hash would move held-out scenes into what was trained on
STORED = [297876190, 1489305978, 265525979]
STORED_SECOND = [2086853398, 916049547]


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_alone_equals_the_scene_in_a_batch(split):
    batch = sample_scenes(torch.arange(40), split)
    alone = sample_scenes(torch.tensor([17]), split)
    shuffled = sample_scenes(torch.tensor([30, 17, 2]), split)
    for name, value in fields(alone):
        assert torch.equal(getattr(batch, name)[17:18], value), name
        assert torch.equal(getattr(shuffled, name)[1:2], value), name


def test_random_state_plays_no_part():
    torch.manual_seed(1)
    first = sample_scenes(torch.arange(5))
    torch.manual_seed(2)
    assert torch.equal(first.position, sample_scenes(torch.arange(5)).position)


def test_splits_differ():
    positions = [sample_scenes(torch.arange(100), split).position for split in SPLITS]
    for i, first in enumerate(positions):
        for second in positions[i + 1 :]:
            assert not (first == second).all(-1).all(-1).any()


@pytest.mark.parametrize("max_objects", [1, 2, 3])
def test_every_attribute_occurs(max_objects):
    scenes = sample_scenes(torch.arange(2000), max_objects=max_objects)
    assert scenes.number.unique().tolist() == list(range(1, max_objects + 1))
    assert scenes.max_objects == max_objects
    for values, names in (
        (scenes.shape, SHAPES),
        (scenes.colour, COLOURS),
        (scenes.size, SIZES),
        (scenes.material, MATERIALS),
        (scenes.background[:, None], BACKGROUNDS),
    ):
        shares = torch.bincount(values[:, 0], minlength=len(names)) / len(values)
        assert len(shares) == len(names) and shares.min() > 0.45 / len(names)
    assert class_of(scenes).unique().numel() == NUM_CLASSES


def test_objects_of_a_scene_differ_in_colour_and_are_apart():
    scenes = sample_scenes(torch.arange(2000))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        both = scenes.number > second
        assert (scenes.colour[:, first] != scenes.colour[:, second]).all()
        apart = (scenes.position[:, first] - scenes.position[:, second]).norm(dim=-1)
        gap = (apart - scenes.radius[:, first] - scenes.radius[:, second])[both]
        assert (gap < 0).float().mean() < 0.05 and gap.min() > -0.1
    assert (scenes.position.abs() + scenes.radius[..., None]).max() < 1.01


def test_sizes_do_not_overlap():
    scenes = sample_scenes(torch.arange(1000))
    small, medium, large = (scenes.radius[scenes.size == size] for size in range(3))
    assert 1.3 * small.max() < medium.min() and 1.3 * medium.max() < large.min()


def test_indexing_and_moving():
    scenes = sample_scenes(torch.arange(6))
    some = scenes[torch.tensor([4, 1])].to("cpu")
    assert len(some) == 2 and some.index.tolist() == [4, 1]
    assert len(scenes[2:5]) == 3
    assert torch.equal(some.velocity[0], scenes.velocity[4])


def test_classes():
    scenes = sample_scenes(torch.arange(50))
    for number, shape, colour in zip(class_of(scenes), scenes.shape[:, 0], scenes.colour[:, 0], strict=True):
        assert CLASS_NAMES[number] == f"{COLOURS[colour]} {SHAPES[shape]}"
    assert class_caption("red star") == "a red star"
    assert class_caption("orange ring") == "an orange ring"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="split is 'trian'; give one of train, validation"):
        sample_scenes(torch.arange(2), "trian")
    with pytest.raises(ValueError, match="max_objects is 4; give 1, 2 or 3"):
        sample_scenes(torch.arange(2), max_objects=4)
    with pytest.raises(ValueError, match="none of the 80"):
        class_caption("mauve star")


def test_sizes_and_backgrounds_can_be_chosen():
    index = torch.arange(500)
    chosen = sample_scenes(index, sizes=("large", "small"), backgrounds=("sea", "hills"))
    assert set(chosen.size.flatten().tolist()) == {SIZES.index("small"), SIZES.index("large")}
    assert {BACKGROUNDS[i] for i in chosen.background.tolist()} == {"sea", "hills"}
    # no two large ones in a scene of several
    several = chosen.number >= 2
    assert ((chosen.size == 2) & (torch.arange(3) < chosen.number[:, None])).sum(1)[several].max() == 1
    # what is not chosen stays as it is
    assert torch.equal(chosen.shape, sample_scenes(index).shape)
    assert set(sample_scenes(index, max_objects=1, sizes=("large",)).size.flatten().tolist()) == {2}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sizes": ()}, "sizes is ..; give some of small, medium, large"),
        ({"backgrounds": ("moon",)}, "backgrounds is .'moon'.; give some of gradient"),
        ({"sizes": ("large",)}, "max_objects 3; give a smaller size too, or 1 object"),
    ],
)
def test_choices_that_cannot_be_had(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample_scenes(torch.arange(2), **settings)
