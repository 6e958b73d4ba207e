import pytest
from compare_runs import clips_of, compare
from PIL import Image

from asyncdiff_pl.data.scenes import write_coco


@pytest.fixture
def runs(tmp_path):
    write_coco(tmp_path / "coco", "demo", 2, size=32, start=9)
    for name, colour in (("a", "red"), ("b", "blue")):
        for sample in ("9", "10"):
            folder = tmp_path / name / "frames" / "steps=4" / sample
            folder.mkdir(parents=True)
            for frame in range(3):
                picture = Image.new("RGB", (32, 32), colour)
                picture.paste("white", (8 * frame, 0, 8 * frame + 8, 8))
                picture.save(folder / f"{frame:04}.png")
    return tmp_path


def test_samples_stand_below_each_other_in_order_of_their_ids(runs):
    assert list(clips_of(runs / "a")) == ["9", "10"]


@pytest.mark.parametrize(("name", "frames"), [("x.gif", 3), ("x.png", 1)])
def test_each_run_has_its_columns(runs, name, frames):
    compare({"first": runs / "a", "second": runs / "b"}, runs / "coco", runs / name, columns=2)
    with Image.open(runs / name) as picture:
        assert getattr(picture, "n_frames", 1) == frames
        pixels = picture.convert("RGB")
    bottom = [pixels.getpixel((x, pixels.height - 5)) for x in range(pixels.width)]
    red, blue = ([x for x, found in enumerate(bottom) if found == colour] for colour in ((255, 0, 0), (0, 0, 255)))
    columns = 2 if name == "x.png" else 1
    assert len(red) == len(blue) == 32 * columns
    assert max(red) < min(blue)


def test_other_endings_and_runs_without_frames(runs):
    with pytest.raises(ValueError, match=r"should end in .gif or .png"):
        compare({"first": runs / "a"}, runs / "coco", runs / "x.mp4")
    with pytest.raises(ValueError, match="has frames of 0 step counts"):
        compare({"first": runs / "coco"}, runs / "coco", runs / "x.png")
