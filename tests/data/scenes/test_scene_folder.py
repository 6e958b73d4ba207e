import numpy as np
import pytest
import torch
from PIL import Image

from asyncdiff_pl.data import CocoCaptions
from asyncdiff_pl.data.scenes import captions, draw, sample_scenes, write_coco


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_folder_is_read_as_coco(tmp_path, image_format):
    write_coco(tmp_path, "demo", 3, size=64, start=30, image_format=image_format)
    data = CocoCaptions(str(tmp_path / "images"), str(tmp_path / "captions.json"), height=64, width=64)
    data.check()
    samples = data.samples()
    scenes = sample_scenes(torch.arange(30, 33), "demo")
    assert data.ids() == ["30", "31", "32"]
    assert [samples[n].captions for n in range(3)] == captions(scenes)
    truth = draw(scenes, torch.zeros(3, 1), 64)[:, 0]
    for number in range(3):
        pixels = torch.from_numpy(np.array(samples[number].image)).permute(2, 0, 1) / 255
        assert (pixels - truth[number]).abs().mean() < (0.003 if image_format == "png" else 0.03)


def test_options(tmp_path):
    write_coco(tmp_path, "test", 34, size=16, max_objects=1)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names[0] == "test_000000.png" and names[-1] == "test_000033.png" and len(names) == 34
    assert Image.open(tmp_path / "images" / names[0]).size == (16, 16)


def test_bad_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match="count is 0, start 0, size 128"):
        write_coco(tmp_path, "test", 0)
