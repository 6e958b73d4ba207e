import json

import pytest
import torch
from embedded_measures import among_random, by_changed_attribute, changed_attribute
from embedded_report import Line, Options, markdown, report

from asyncdiff_pl.data.scenes import sample_scenes
from asyncdiff_pl.data.scenes.captions import contents
from asyncdiff_pl.data.scenes.changed_captions import changed_contents


@pytest.mark.parametrize(
    ("value", "low", "high", "bound", "result"),
    [
        (0.91, 0.9, None, ">= 0.9", "pass"),
        (0.9, 0.9, None, ">= 0.9", "pass"),
        (0.89, 0.9, None, ">= 0.9", "MISS"),
        (1.4, None, 1.3, "<= 1.3", "MISS"),
        (1.2, 0.5, 2, "0.5 to 2", "pass"),
        (2.1, 0.5, 2, "0.5 to 2", "MISS"),
        (float("nan"), 0.5, None, ">= 0.5", "MISS"),
        (float("nan"), None, 1.3, "<= 1.3", "MISS"),
        (3.0, None, None, "", ""),
    ],
)
def test_a_figure_and_its_bound(value, low, high, bound, result):
    line = Line("tiny-clip", "rate", value, low, high)
    assert (line.bound, line.result) == (bound, result)


def test_the_report():
    lines = [Line("tiny-clip", "rate", 0.912345, low=0.9, note="500 scenes"), Line("tiny-sd", "score", 30.0)]
    assert "| tiny-clip | rate | 0.9123 (500 scenes) | >= 0.9 | pass |" in markdown(lines)
    found = json.loads(report(Options(device="cpu", limit=3), lines))
    assert found["settings"]["limit"] == 3
    assert [figure["result"] for figure in found["figures"]] == ["pass", ""]


def test_every_changed_caption_has_its_attribute():
    scenes = sample_scenes(torch.arange(20), "test")
    for content, changed in zip(contents(scenes), changed_contents(scenes, 20), strict=True):
        assert {changed_attribute(content, change) for change in changed} <= {
            *("shape", "colour", "size", "material"),
            *("background", "background colour"),
        }


def test_the_attribute_is_the_right_one():
    content = contents(sample_scenes(torch.arange(1), "test"))[0]
    thing = content.things[0]
    other_size = content._replace(things=(thing._replace(size=(thing.size + 1) % 3), *content.things[1:]))
    other_ground = content._replace(background=(content.background + 1) % 11)
    found = changed_attribute(content, other_size), changed_attribute(content, other_ground)
    assert found == ("size", "background")


def test_rates_by_attribute_count_only_scenes_that_have_it():
    similarity = torch.tensor([[0.5, 0.6, 0.1], [0.5, 0.4, 0.9]])
    found = by_changed_attribute(similarity, [["size", "shape"], ["size", "size"]])
    assert {name: flags.tolist() for name, flags in found.items()} == {"shape": [True], "size": [False, False]}


def test_the_true_caption_among_random_ones():
    class Words:
        def texts(self, texts):
            return torch.eye(150)[[int(text) for text in texts]]

    images = torch.eye(150)[[0, 5, 2]]
    assert among_random(Words(), images, [str(number) for number in range(150)], seed=0).tolist() == [1.0, 0.0, 1.0]
