import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from asyncdiff_pl.data import CocoCaptions
from asyncdiff_pl.data.coco import DEMO_FOLDER
from asyncdiff_pl.data.pictures import fit_image

SHARED_COCO = Path(__file__).parents[2] / ".." / "shared" / "data" / "coco"

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.batches = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def predict_step(self, batch, batch_idx):
        self.batches.append([sample.id for sample in batch])


def captions_of(captions):
    """COCO's content for `{image id: captions}`."""
    notes = [(key, text) for key, texts in captions.items() for text in texts]
    return {
        "images": [{"id": key, "file_name": f"{key:06}.png"} for key in captions],
        "annotations": [{"id": n, "image_id": key, "caption": text} for n, (key, text) in enumerate(notes)],
    }


def make(folder, captions, present=None, content=None, **kwargs):
    """A data module over a folder with small images, and the annotation file for them."""
    (folder / "images").mkdir(exist_ok=True)
    for key in captions if present is None else present:
        Image.new("RGB", (24, 16), (key % 256, 0, 0)).save(folder / "images" / f"{key:06}.png")
    content = captions_of(captions) if content is None else content
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "captions.json").write_text(text)
    size = {"height": 16, "width": 24}
    return CocoCaptions(str(folder / "images"), str(folder / "captions.json"), **{**size, **kwargs})


def thirds(horizontal, size):
    """An image of three equal stripes: red, green, blue, from the left or from the top."""
    width, height = size
    image = Image.new("RGB", size)
    for k, colour in enumerate((RED, GREEN, BLUE)):
        if horizontal:
            image.paste(colour, (k * width // 3, 0, (k + 1) * width // 3, height))
        else:
            image.paste(colour, (0, k * height // 3, width, (k + 1) * height // 3))
    return image


def test_crop_cuts_both_sides_equally_and_keeps_the_middle():
    wide = thirds(True, (96, 32))  # covers 64 x 64 at twice its size: 192 x 64, of which the middle third is left
    assert np.array(fit_image(wide, 64, 64, "crop"))[:, 8:56].reshape(-1, 3).tolist() == [list(GREEN)] * (64 * 48)
    tall = thirds(False, (32, 96))
    assert np.array(fit_image(tall, 64, 64, "crop"))[8:56].reshape(-1, 3).tolist() == [list(GREEN)] * (48 * 64)


def test_crop_shows_the_exact_part_of_the_source():
    # a ramp of 2 a pixel, 100 wide, cut to its middle 50 x 50: columns 25 to 74
    ramp = np.broadcast_to((2 * np.arange(100, dtype=np.uint8))[None, :, None], (50, 100, 3))
    cropped = np.array(fit_image(Image.fromarray(ramp.copy()), 50, 50, "crop"))
    assert np.array_equal(cropped, ramp[:, 25:75])


@pytest.mark.parametrize(
    ("source", "size", "box"),
    [
        ((96, 32), (64, 64), (0, 21, 64, 42)),  # 64 x 21 between bars of 21 and 22 rows
        ((32, 96), (64, 64), (21, 0, 42, 64)),
        ((640, 480), (1024, 576), (128, 0, 896, 576)),
        ((480, 640), (1024, 576), (296, 0, 728, 576)),
        ((64, 36), (1024, 576), (0, 0, 1024, 576)),
    ],
)
def test_pad_shows_the_whole_image_between_equal_black_bars(source, size, box):
    fitted = np.array(fit_image(Image.new("RGB", source, (255, 255, 255)), *size, "pad"))
    assert fitted.shape == (size[1], size[0], 3)
    rows, columns = np.nonzero(fitted[..., 0] == 255)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(found, box)).max() <= 1
    assert (found[2] - found[0]) * (found[3] - found[1]) == (fitted[..., 0] > 0).sum()


def test_stretch_shows_the_whole_image():
    for source in ((96, 32), (32, 96)):
        stripes = np.array(fit_image(thirds(True, source), 96, 48, "stretch"))
        assert stripes.shape == (48, 96, 3)
        for k, colour in enumerate((RED, GREEN, BLUE)):
            assert (stripes[:, 32 * k + 10 : 32 * k + 22] == colour).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_an_image_of_the_right_size_stays_as_it_is(fit):
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert np.array_equal(np.array(fit_image(Image.fromarray(noise), 24, 16, fit)), noise)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_samples_have_the_size_of_the_run(fit, tmp_path):
    data = make(tmp_path, {1: ["one"]}, height=40, width=24, fit=fit)
    image = data.samples()[0].image
    assert image.size == (24, 40)
    assert image.mode == "RGB"


def test_images_stand_upright(tmp_path):
    data = make(tmp_path, {1: ["one"]}, height=24, width=16)
    image = thirds(True, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored is to be turned clockwise by a quarter
    image.save(tmp_path / "images" / "000001.png", exif=exif)
    shown = np.array(data.samples()[0].image)
    assert shown.shape == (24, 16, 3)
    assert shown[1, 8].tolist() == list(RED)
    assert shown[22, 8].tolist() == list(BLUE)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    data = make(tmp_path, {1: ["one"]})
    suffix = "jpeg" if mode == "CMYK" else "png"
    Image.new("RGB", (24, 16)).convert(mode).save(tmp_path / "images" / "000001.png", format=suffix)
    assert data.samples()[0].image.mode == "RGB"


def test_images_come_in_order_of_id_each_with_all_its_captions(tmp_path):
    captions = {30: ["c", "cc"], 4: ["a"], 200: ["d", "e", "f"]}
    data = make(tmp_path, captions)
    assert data.ids() == ["4", "30", "200"]
    samples = [data.samples()[k] for k in range(3)]
    assert [sample.captions for sample in samples] == [("a",), ("c", "cc"), ("d", "e", "f")]
    assert [sample.id for sample in samples] == data.ids()
    assert [sample.image.getpixel((3, 3))[0] for sample in samples] == [4, 30, 200]


def test_absent_images_are_left_out_and_their_number_is_said_once(tmp_path, caplog):
    data = make(tmp_path, {key: ["x"] for key in range(1, 9)}, present=[2, 5, 7], max_images=2)
    with caplog.at_level("INFO"):
        data.check()
        data.setup("predict")
        assert data.ids() == ["2", "5"]
    said = [record.getMessage() for record in caplog.records if "annotated" in record.getMessage()]
    assert said == [f"using 3 of 8 annotated images: 5 are not in {tmp_path / 'images'}; max_images takes the first 2"]


def test_pycocotools_stays_silent(tmp_path, capsys):
    make(tmp_path, {1: ["one"]}).check()
    assert capsys.readouterr().out == ""


def test_only_images_of_the_run_need_captions(tmp_path):
    captions = {1: ["a"], 2: [], 3: ["c"], 4: [" "]}
    assert make(tmp_path, captions, max_images=1).ids() == ["1"]
    with pytest.raises(ValueError, match=r"1 of the 3 images of the run .* \(ids 2\).* skip_uncaptioned: true"):
        make(tmp_path, captions, max_images=3).check()
    with pytest.raises(ValueError, match=r"2 of the 4 images of the run .* \(ids 2, 4\)"):
        make(tmp_path, captions).check()
    assert make(tmp_path, captions, max_images=2, skip_uncaptioned=True).ids() == ["1", "3"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("nothing", "is not JSON"),
        ("", "is not JSON"),
        ([{"image_id": 1, "caption": "a"}], "it holds a list"),
        ("3", "it holds a int"),
        ({"info": {}}, "it has no `images`"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "info": {}}, "it has no `annotations`"),
        ({"images": [], "annotations": []}, "it has no `images`"),
        (
            {
                "images": [{"id": 1, "file_name": "000001.png"}],
                "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 3}],
                "categories": [{"id": 3, "name": "cat"}],
            },
            "1 of its 1 annotations have no `caption` of type str",
        ),
        (
            {"images": [{"imgid": 0, "filename": "a.jpg", "sentences": [{"raw": "a"}]}], "dataset": "flickr30k"},
            "1 of its 1 images have no `id`",
        ),
        (
            {"images": [{"id": "a", "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]},
            "1 of its 1 images have no `id` of type int",
        ),
        (
            {
                "images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}],
                "annotations": [{"id": 1, "image_id": 1, "caption": "a"}],
            },
            "1 of its images have the id of another",
        ),
    ],
)
def test_a_file_of_another_format_is_told_in_one_sentence(content, fault, tmp_path):
    with pytest.raises(ValueError) as caught:
        make(tmp_path, {1: ["one"]}, content=content if isinstance(content, str) else json.dumps(content)).check()
    message = str(caught.value)
    assert fault in message
    assert str(tmp_path / "captions.json") in message
    assert "give a captions file in COCO's format" in message


def test_an_image_for_the_annotation_file_is_told_in_one_sentence(tmp_path):
    data = make(tmp_path, {1: ["one"]})
    data.annotations = tmp_path / "images" / "000001.png"
    with pytest.raises(ValueError, match=r"000001\.png is not JSON"):
        data.check()


def test_an_empty_list_of_categories_does_no_harm(tmp_path):
    content = {**captions_of({1: ["one"]}), "categories": []}
    assert make(tmp_path, {1: ["one"]}, content=content).ids() == ["1"]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"max_images": 0}, "max_images is 0; give a number from 1 up, or null"),
        ({"height": 100}, "height is 100 pixels; give a multiple of 8"),
        ({"width": 0}, "width is 0 pixels; give a multiple of 8"),
        ({"width": -8}, "width is -8 pixels; give a multiple of 8"),
        ({"fit": "cover"}, "fit is 'cover'; give crop, pad or stretch"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"caption_index": -1}, "caption_index is -1; give a number from 0 up, in_turn, or null"),
    ],
)
def test_bad_arguments_are_told_with_the_remedy(kwargs, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, {1: ["one"]}, **kwargs).check()


def test_missing_files_are_told_with_the_remedy(tmp_path):
    make(tmp_path, {1: ["one"]})
    images, captions = str(tmp_path / "images"), str(tmp_path / "captions.json")
    for arguments, sentence in (
        ((str(tmp_path / "nowhere"), captions), "nowhere is not a folder; give the folder"),
        ((captions, captions), "captions.json is not a folder"),
        ((images, str(tmp_path / "nothing.json")), "nothing.json is not a file; give a captions file"),
        ((images, images), "images is not a file"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CocoCaptions(*arguments).check()


def test_captions_of_other_images_are_told_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"None of the 2 images .*\(000001\.png for one\); give the folder"):
        make(tmp_path, {1: ["one"], 2: ["two"]}, present=[3]).check()
    with pytest.raises(ValueError, match=r"None of the 1 images .* has a caption"):
        make(tmp_path, {1: [], 2: ["two"]}, present=[1], skip_uncaptioned=True).setup("predict")


def test_broken_files_are_reported_and_left_out(tmp_path):
    data = make(tmp_path, {key: ["x"] for key in range(1, 7)}, batch_size=2)
    images = tmp_path / "images"
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((240, 160), 80).save(whole)
    (images / "000002.png").write_bytes(whole.read_bytes()[:3000])
    (images / "000003.png").write_bytes(b"")
    (images / "000004.png").write_bytes((images / "000001.png").read_bytes()[:-30])
    (images / "000005.png").write_text("<html>404</html>")
    model = Recorder()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.warns(UserWarning) as caught:
        trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **options)
        trainer.predict(model, data, return_predictions=False)
    assert model.batches == [["1"], [], ["6"]]
    assert data.num_unreadable == 4
    told = [str(warning.message) for warning in caught if "cannot be read" in str(warning.message)]
    assert [name for name in range(1, 7) for line in told if f"{name:06}.png cannot be read" in line] == [2, 3, 4, 5]


def test_the_packaged_sample_is_whole():
    data = CocoCaptions("demo", "demo", height=240, width=320)
    assert data.num_samples == 16
    for k in range(16):
        sample = data.samples()[k]
        assert sample.image.size == (320, 240)
        assert len(set(sample.captions)) == 5
    assert sum(path.stat().st_size for path in DEMO_FOLDER.rglob("*") if path.is_file()) < 250_000


def test_the_chosen_caption_is_the_prompt_and_all_of_them_score(tmp_path):
    captions = {1: ["a", "b", "c"], 2: ["d", "e"]}
    first = make(tmp_path, captions).samples()[0]
    assert (first.prompt, first.text, first.captions) == (None, "a", ("a", "b", "c"))
    chosen = make(tmp_path, captions, caption_index=1).samples()
    assert [chosen[k].text for k in range(2)] == ["b", "e"]
    assert chosen[0].captions == ("a", "b", "c")


def test_a_caption_that_some_image_of_the_run_has_not(tmp_path):
    captions = {1: ["a", "b", "c"], 2: ["d", "e"], 3: ["f"]}
    with pytest.raises(ValueError) as caught:
        make(tmp_path, captions, caption_index=2).check()
    assert "caption_index is 2, counted from 0, but 2 of the 3 images of the run have fewer than 3" in str(caught.value)
    assert "(ids 2, 3); give at most 0." in str(caught.value)
    assert make(tmp_path, captions, caption_index=2, max_images=1).samples()[0].text == "c"


def test_the_protocol_of_tables_takes_caption_and_seed_by_number(tmp_path):
    captions = {9: ["a", "b", "c"], 2: ["d", "e"], 5: ["f", "g", "h"], 7: ["i", "j"]}
    data = make(tmp_path, captions, caption_index="in_turn", number_as_seed=True)
    assert data.ids() == ["2", "5", "7", "9"]
    assert [data.samples()[k].text for k in range(4)] == ["d", "g", "i", "a"]
    assert [data.samples()[k].seed for k in range(4)] == [0, 1, 2, 3]
    assert data.samples()[3].captions == ("a", "b", "c")
    assert make(tmp_path, captions).samples()[1].seed is None


def test_captions_are_served_without_images(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(captions_of({7: ["a", "b"], 3: ["c", "d"]})))
    data = CocoCaptions(None, str(tmp_path / "captions.json"), caption_index=1)
    assert data.ids() == ["3", "7"]
    assert [data.samples()[k].text for k in range(2)] == ["d", "b"]
    assert data.samples()[0].image is None
    assert (data.height, data.width) == (None, None), "the model says what the size is"


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_dark_and_bright_stay_apart_in_pictures_of_8_and_of_16_bits(mode, tmp_path):
    data = make(tmp_path, {1: ["one"]})
    ramp = np.broadcast_to(np.linspace(0, 255, 24).astype(np.uint8), (16, 24))
    picture = Image.fromarray(ramp.astype(np.uint16) * 257 if mode == "I;16" else np.stack([ramp] * 3, -1))
    assert picture.mode == mode
    picture.save(tmp_path / "images" / "000001.png")
    assert np.array_equal(np.array(data.samples()[0].image)[..., 1], ramp)


@pytest.mark.skipif(not SHARED_COCO.is_dir(), reason="needs some of COCO's images")
def test_part_of_coco_is_read_in_order():
    data = CocoCaptions(str(SHARED_COCO / "val2017"), str(SHARED_COCO / "captions_val2017.json"))
    names = sorted(path.stem for path in (SHARED_COCO / "val2017").glob("*.jpg"))
    assert [f"{int(name):012}" for name in data.ids()] == names
    assert len(names) == 48
    assert all(len(entry.captions) >= 5 for entry in data.entries)
    sample = data.samples()[0]
    assert sample.id == "139"
    assert sample.image.size == (1024, 576)
    assert sample.captions[0] == "A woman stands in the dining area at the table."
