import pytest

from asyncdiff_pl.data import ClassLabels


def served(data):
    samples = [data.samples()[k] for k in range(data.num_samples)]
    assert [sample.id for sample in samples] == data.ids()
    return [(sample.id, sample.inputs["class_label"], sample.captions) for sample in samples]


def test_classes_are_served_by_number_and_by_name():
    data = ClassLabels([207, "orange star"], caption="a photo of a {label}")
    assert served(data) == [("207", 207, ()), ("orange star", "orange star", ("a photo of a orange star",))]
    assert data.samples()[0].text == ""


def test_several_samples_of_a_class_differ_in_their_ids_and_so_in_their_noise():
    assert served(ClassLabels([3, 1], samples_per_class=2)) == [
        ("3-0", 3, ()),
        ("3-1", 3, ()),
        ("1-0", 1, ()),
        ("1-1", 1, ()),
    ]


def test_all_are_as_many_as_the_model_knows():
    assert ClassLabels("all", num_classes=3).ids() == ["0", "1", "2"]
    assert ClassLabels("all").num_samples == 1000


def test_they_come_in_batches():
    batches = ClassLabels([5, 6, 7], batch_size=2).predict_dataloader()
    assert [[sample.id for sample in batch] for batch in batches] == [["5", "6"], ["7"]]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"labels": []}, r"labels is \[\]; give a list of classes, \[207, 360\] say, or all\."),
        ({"labels": "tench"}, "labels is 'tench'; give a list"),
        ({"labels": [1000]}, "labels has 1000, but the classes are 0 to 999; give one of them, or set num_classes"),
        ({"labels": [-1]}, "labels has -1, but the classes are 0 to 999"),
        ({"labels": [1, "dog", 1, "dog"]}, "labels has 1, dog more than once; give each once, and set samples_per"),
        ({"labels": [1], "samples_per_class": 0}, "samples_per_class is 0; give a number from 1 up"),
        ({"labels": "all", "num_classes": 0}, "num_classes is 0; give a number from 1 up"),
        ({"labels": [1], "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments_are_told_with_the_remedy(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassLabels(**kwargs).check()
