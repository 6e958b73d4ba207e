"""`compare` on log folders and plain folders of small pictures."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.cli.compare import run_compare
from asyncdiff_pl.report.compare import compare
from asyncdiff_pl.report.picture_sets import pair, read_set
from asyncdiff_pl.report.sheet import draw_sheet, scaled, some_of


def picture(seed, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 200, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def write_run(folder, steps=(4,), ids=("1", "2", "10"), frames=1, change=0, score=20.0, size=(48, 32), **results):
    """A log folder as the callbacks leave it; `change` is added to the pictures of all samples but the first."""
    rows = []
    for n in steps:
        for index, name in enumerate(ids):
            place = folder / "frames" / f"steps={n}" / name
            place.mkdir(parents=True)
            for frame in range(frames):
                changed = picture(index + 10 * frame, size).point(lambda value, k=index: value + change * (k > 0))
                path = place / f"{frame:04}.png" if frames > 1 else place.with_name(f"{name}.png")
                changed.save(path)
            if frames == 1:
                place.rmdir()
            seconds = {"seconds": str(2.0 + index - change / 10), "timed": str(index > 0), "step_latency_ms": "100"}
            scores = {"score": str(score + index), "scorer": "CLIP score (x)"}
            rows.append({"steps": str(n), "id": name, **scores, **seconds})
    for name, content in (("samples", rows), ("results", [{"steps": str(n), **results} for n in steps])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(content[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(content)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "one", model="tiny-sd", stages=1, mib_per_step="0")
    second = write_run(tmp_path / "two", change=10, score=21.0, model="tiny-sd", stages=2, mib_per_step="2.5")
    return first, second


def lines_of(folder):
    return {row["quantity"]: row for row in read_table(folder / "compare.csv")}


def test_two_runs(runs, tmp_path):
    said = compare(*runs, labels=["one rank", "two stages"], output=str(tmp_path / "out"))
    lines = lines_of(tmp_path / "out")
    assert lines["samples"]["difference"] == "3 in common"
    assert (lines["stages"]["a"], lines["stages"]["b"]) == ("1", "2")
    assert "model" not in lines
    # the first sample is not timed; the others take 3 and 4 seconds, and one less
    seconds = lines["seconds a sample"]
    assert [float(seconds[name]) for name in ("a", "a_error", "b", "difference", "difference_error")] == pytest.approx(
        [3.5, 0.5, 2.5, -1, 0]
    )
    assert lines["speed-up"]["b"] == "1x"
    assert float(lines["CLIP score (x)"]["difference"]) == pytest.approx(1)
    assert lines["pixel by pixel the same"]["difference"] == "1 of 3"
    # each pixel of two pictures is 10 of 255 too bright; the third has no finite ratio
    assert float(lines["PSNR, dB"]["difference"]) == pytest.approx(20 * np.log10(25.5), abs=1e-3)
    assert 0.9 < float(lines["SSIM"]["difference"]) < 1
    samples = read_table(tmp_path / "out" / "compare_samples.csv")
    assert [(row["id"], row["equal"], row["psnr_db"][:4]) for row in samples] == [
        ("1", "1", "inf"),
        ("2", "0", "28.1"),
        ("10", "0", "28.1"),
    ]
    header, *rest = said.splitlines()
    assert header.split() == ["one", "rank", "two", "stages", "B", "-", "A,", "or", "B", "against", "A"]
    scores = next(line for line in rest if line.startswith("4 steps  CLIP score (x)"))
    assert "21.00 ± 0.58" in scores
    assert "22.00 ± 0.58" in scores
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| 4 steps | stages | 1 | 2 |  |" in text
    with Image.open(tmp_path / "out" / "compare.png") as sheet:
        # three columns of pictures that are five times as large, and three rows with a line of text
        assert sheet.width == 3 * 240 + 2 * 10 + 2 * 10
        assert 3 * 160 < sheet.height < 3 * 240


def test_a_video_shows_its_first_middle_and_last_frame(tmp_path):
    folders = [write_run(tmp_path / name, frames=5, change=change) for name, change in (("a", 0), ("b", 9))]
    compare(*folders, output=str(tmp_path / "out"), rows=2)
    assert lines_of(tmp_path / "out")["SSIM"]["difference"]
    with Image.open(tmp_path / "out" / "compare.png") as sheet:
        assert sheet.width == 3 * (3 * 144 + 2 * 2) + 2 * 10 + 2 * 10
    assert some_of(list("abcde"), 3) == ["a", "c", "e"]
    assert some_of(["a"], 3) == ["a"]


def test_a_run_and_real_pictures_of_other_names_and_sizes(tmp_path, runs):
    images = tmp_path / "images"
    images.mkdir()
    content = {"images": [], "annotations": []}
    for number in (1, 2, 77):
        picture(number, size=(90, 80)).save(images / f"photo_{number}.jpg")
        content["images"].append({"id": number, "file_name": f"photo_{number}.jpg"})
        content["annotations"].append({"id": number, "image_id": number, "caption": "a red ball"})
    (tmp_path / "captions.json").write_text(json.dumps(content))
    told = compare(
        runs[0],
        str(images),
        annotations=str(tmp_path / "captions.json"),
        clip="tiny-clip",
        frechet="tiny-clip",
        dump=str(tmp_path / "dumped"),
        output=str(tmp_path / "out"),
    )
    assert "pictures are brought to 48x32 pixels" in told
    lines = lines_of(tmp_path / "out")
    assert (lines["samples"]["b"], lines["samples"]["difference"]) == ("3", "2 in common")
    distance = next(row for name, row in lines.items() if name.startswith("frechet_distance (tiny-clip"))
    assert float(distance["difference"]) > 0
    assert "is of 3 and 3 pictures, and the network has" in told
    score = next(row for name, row in lines.items() if name.startswith("CLIP score (tiny-clip"))
    assert score["a"]
    assert score["difference"]
    assert sorted(path.name for path in (tmp_path / "dumped").iterdir()) == ["1.png", "2.png", "77.png"]
    with Image.open(tmp_path / "dumped" / "77.png") as dumped:
        assert dumped.size == (48, 32)
    # what was dumped compares without the annotations
    compare(runs[0], str(tmp_path / "dumped"), output=str(tmp_path / "again"))
    assert lines_of(tmp_path / "again")["PSNR, dB"] == lines["PSNR, dB"]


def test_samples_belong_together_by_step_count_and_id(tmp_path):
    a = read_set(write_run(tmp_path / "a", steps=(4, 8)))
    b = read_set(write_run(tmp_path / "b", steps=(8, 16), ids=("2", "10", "x")))
    c = read_set(write_run(tmp_path / "c", steps=(5,), ids=("10",)))
    assert pair(a, b) == {(8, 8): [((8, "2"), (8, "2")), ((8, "10"), (8, "10"))]}
    assert pair(a, c) == {(n, 5): [((n, "10"), (5, "10"))] for n in (4, 8)}
    plain = tmp_path / "plain"
    plain.mkdir()
    picture(0).save(plain / "000000000002.png")
    assert pair(c, read_set(str(plain))) == {}
    assert pair(read_set(str(plain)), b) == {(None, n): [((None, "000000000002"), (n, "2"))] for n in (8, 16)}
    d = read_set(write_run(tmp_path / "d", steps=(1, 2)))
    with pytest.raises(ValueError, match=r"no step count in common \(4, 8, and 1, 2\)"):
        pair(a, d)


def test_the_captions_of_a_run_come_from_its_config(tmp_path):
    folder = write_run(tmp_path / "a")
    data = {"class_path": "asyncdiff_pl.data.CocoCaptions", "init_args": {"images_dir": "demo", "annotations": "demo"}}
    (tmp_path / "a" / "config.yaml").write_text(json.dumps({"data": data}))
    assert len(read_set(folder).captions) == 16
    assert read_set(folder).captions["1"]


def test_networks_that_cannot_be_had_leave_their_column_out(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("asyncdiff_pl.metrics.lpips.ALEXNET", (tmp_path / "nowhere-7be5be79.pth").as_uri())
    told = compare(*runs, lpips="fetch", frechet="inception", output=str(tmp_path / "out"))
    assert "no LPIPS: AlexNet's weights for LPIPS could not be fetched" in told
    assert "no Fréchet distance: FID's Inception network cannot be had" in told
    assert not {"LPIPS", "fid"} & set(lines_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{a}", "nowhere"], "^There is no folder nowhere to compare; give a run's log folder or a folder"),
        (["{a}"], r"^compare takes two folders: python -m asyncdiff_pl compare A B.$"),
        (["{a}", "{other}"], r"one and .*other have no samples in common \(ids such as 1 and x\); give"),
        (["{a}", "{large}"], r"The frames of .*one are 48x32 and those of .*large 64x32 pixels; compare"),
        (["{a}", "{empty}"], "holds no pictures; give another folder"),
        (["{a}", "{b}", "--rows", "0"], "rows is 0; give a number of samples from 1 up"),
        (["{a}", "{b}", "--output", "{a}/samples.csv"], "samples.csv, which is a file; give a folder"),
        (["{a}", "{broken}"], r"1.png cannot be read; remove it from"),
        (["{a}", "{b}", "--rows", "x"], "rows is x; it must be int"),
        (["{a}", "{b}", "--labels", "[x]"], "give two, one for each folder"),
        (["{a}", "{b}", "--device", "tpu9"], "device is tpu9, which torch does not find here"),
        (["{a}", "{b}", "--lpips", "nowhere.pth"], "There is no file nowhere.pth for LPIPS"),
        (["{a}", "{b}", "--frechet", "nowhere.pt"], "There is no file nowhere.pt of a feature network"),
        (["{a}", "{b}", "--clip", "./nowhere"], "There is no folder ./nowhere"),
        (["{a}", "{b}", "--dump", "x"], "dump writes the pictures of one plain folder, but there are 0"),
        (["{a}", "{b}", "--no_such", "x"], "There is no setting --no_such; `compare --help` explains"),
    ],
)
def test_bad_input_is_told_in_one_sentence(runs, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {
        "a": runs[0],
        "b": runs[1],
        "other": write_run(tmp_path / "other", ids=("x",)),
        "large": write_run(tmp_path / "large", size=(64, 32)),
        "empty": str(tmp_path / "empty"),
        "broken": str(tmp_path / "broken"),
    }
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=sentence) as error:
        run_compare([argument.format(**places) for argument in arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "comparison").exists()


def test_sheets_have_room_for_titles_and_long_texts():
    rows = [[[Image.new("RGB", (60, 20), "red")], [Image.new("RGB", (60, 20), "blue")] * 2]] * 2
    plain = draw_sheet(rows, gap=2, between=4, border=3)
    assert plain.size == (60 + 4 + 122 + 6, 20 + 4 + 20 + 6)
    assert plain.getpixel((3, 3)) == (255, 0, 0)
    assert plain.getpixel((67, 46)) == (0, 0, 255)
    told = draw_sheet(rows, ("a", "b"), ("words " * 20, ""), between=4)
    assert told.width == 60 + 4 + 122
    assert told.height > 22 + 3 * 20 + 44
    assert scaled(Image.new("RGB", (400, 100)), 200).size == (200, 50)
    assert scaled(Image.new("RGB", (30, 20)), 100).size == (90, 60)
