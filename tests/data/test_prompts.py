import json
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from asyncdiff_pl.data import PromptFile
from asyncdiff_pl.data.scenes import captions, sample_scenes

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(folder, name, content):
    """A file of some text, of a list of JSON objects, or of a picture's colour; its path."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, tuple):
        Image.new("RGB", (48, 24), content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)), encoding="utf-8")
    return str(path)


def served(data):
    samples = [data.samples()[k] for k in range(data.num_samples)]
    assert [sample.id for sample in samples] == data.ids()
    return samples


# -- formats ------------------------------------------------------------------------------------------------------


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = write(tmp_path, "prompts.txt", "a red ball\n\n# a comment\n  a boat, at sea \r\n")
    first, second = served(PromptFile(path))
    assert (first.id, first.text, first.captions) == ("1", "a red ball", ("a red ball",))
    assert (second.id, second.text) == ("4", "a boat, at sea")
    assert (first.seed, first.inputs, first.image) == (None, {}, None)


TABLES = {
    "prompts.csv": "\ufeffid,prompt, negative_prompt,seed,guidance_scale,prompt_2\n"
    'ball,"a ball, red",,7,4.5,12\n\n,"two ""big""\nlines",blurred,,,\n',
    "prompts.tsv": "id\tprompt\tnegative_prompt\tseed\tguidance_scale\tprompt_2\n"
    'ball\ta ball, red\t\t7\t4.5\t12\n\t"two ""big""\nlines"\tblurred\t\t\t\n',
    "prompts.jsonl": '{"id": "ball", "text": "a ball, red", "negative_prompt": null, "seed": 7, "guidance_scale": 4.5, '
    '"prompt_2": "12"}\n{"prompt": "two \\"big\\"\\nlines", "negative_prompt": "blurred"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_say_the_same_in_every_format(name, tmp_path):
    ball, lines = served(PromptFile(write(tmp_path, name, TABLES[name])))
    assert (ball.id, ball.text, ball.seed) == ("ball", "a ball, red", 7)
    assert ball.inputs == {"guidance_scale": 4.5, "prompt_2": "12"}
    assert (lines.id, lines.text, lines.seed) == (
        {"prompts.csv": "4", "prompts.tsv": "3", "prompts.jsonl": "2"}[name],
        'two "big"\nlines',
        None,
    )
    assert lines.inputs == {"negative_prompt": "blurred"}


def test_several_pictures_of_a_prompt_have_ids_and_seeds_of_their_own(tmp_path):
    rows = [
        {"id": "a", "prompt": "x", "seed": 5, "images": 3},
        {"id": "b", "prompt": "y"},
        {"prompt": "z", "images": 1},
    ]
    path = write(tmp_path, "prompts.jsonl", rows)
    expected = [("a-0", 5), ("a-1", 6), ("a-2", 7), ("b-0", None), ("b-1", None), ("3", None)]
    assert [(sample.id, sample.seed) for sample in served(PromptFile(path, images_per_prompt=2))] == expected
    assert PromptFile(path, max_prompts=1).ids() == ["a-0", "a-1", "a-2"]


def test_what_is_scored_can_differ_from_what_the_model_is_told(tmp_path):
    rows = [{"prompt": "sks dog", "caption": "a dog"}, {"prompt": "b", "caption": ["c", "d"]}, {"prompt": ""}]
    samples = served(PromptFile(write(tmp_path, "prompts.jsonl", rows)))
    assert [(sample.text, sample.captions) for sample in samples] == [
        ("sks dog", ("a dog",)),
        ("b", ("c", "d")),
        ("", ()),
    ]
    (row,) = served(PromptFile(write(tmp_path, "prompts.csv", "prompt,caption\nsks dog,1984\n")))
    assert row.captions == ("1984",)


def test_classes_and_other_arguments_pass_as_they_are(tmp_path):
    path = write(tmp_path, "classes.csv", 'class_label,controlnet_conditioning_scale\n207,"[0.5, 1]"\ntench,\n')
    data = PromptFile(path)
    first, second = served(data)
    assert first.inputs == {"class_label": 207, "controlnet_conditioning_scale": [0.5, 1]}
    assert second.inputs == {"class_label": "tench"}
    assert (first.text, first.captions) == ("", ())
    assert data.input_names == {"class_label", "controlnet_conditioning_scale"}


def test_the_packaged_prompts_are_of_scenes_that_nothing_was_trained_on():
    samples = served(PromptFile("demo"))
    assert [sample.id for sample in samples] == [str(number) for number in range(1, 9)]
    scenes = sample_scenes(torch.tensor([20, 21, 22, 28, 34, 50, 55, 57]), "demo", max_objects=2)
    for sample, wordings in zip(samples, captions(scenes), strict=True):
        assert sample.text in wordings
    assert len({wordings.index(s.text) for s, wordings in zip(samples, captions(scenes), strict=True)}) == 5


# -- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_come_from_beside_the_file(tmp_path):
    write(tmp_path, "in/a.png", RED)
    write(tmp_path, "b.png", BLUE)
    row = {"prompt": "x", "image": "in/a.png", "control_image": ["b.png", "in/a.png"], "ip_adapter_image": "b.png"}
    data = PromptFile(write(tmp_path, "prompts.jsonl", [row]))
    (sample,) = served(data)
    assert sample.image.size == (48, 24)
    assert sample.image.getpixel((0, 0)) == RED
    assert [picture.getpixel((0, 0)) for picture in sample.inputs["control_image"]] == [BLUE, RED]
    assert sample.inputs["ip_adapter_image"].getpixel((0, 0)) == BLUE
    assert data.input_names == {"control_image", "ip_adapter_image"} == sample.inputs.keys()


def test_pictures_get_the_size_of_the_run_and_masks_no_grey(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (30, 50), dtype=np.uint8) * 255
    Image.fromarray(noise).save(tmp_path / "mask.png")
    names = {"image": "mask.png", "mask_image": "mask.png", "control_image": "mask.png", "ip_adapter_image": "mask.png"}
    path = write(tmp_path, "prompts.jsonl", [{"prompt": "x", **names}])
    for fit in ("crop", "pad", "stretch"):
        (sample,) = served(PromptFile(path, height=64, width=40, fit=fit))
        mask = sample.inputs["mask_image"]
        assert sample.image.size == mask.size == sample.inputs["control_image"].size == (40, 64)
        assert (sample.image.mode, mask.mode) == ("RGB", "L")
        assert set(np.unique(np.array(mask))) == {0, 255}
        assert len(np.unique(np.array(sample.image))) > 2
        assert sample.inputs["ip_adapter_image"].size == (50, 30)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_a_table_as_hugging_face_writes_it(name, tmp_path):
    write(tmp_path, "a.png", RED)
    csv = "file_name,text,strength\na.png,a red wall,0.6\n"
    write(
        tmp_path, name, csv if name.endswith("csv") else [{"file_name": "a.png", "text": "a red wall", "strength": 0.6}]
    )
    (sample,) = served(PromptFile(str(tmp_path)))
    assert (sample.text, sample.image.getpixel((5, 5)), sample.inputs) == ("a red wall", RED, {"strength": 0.6})


def test_a_folder_with_captions_beside_the_pictures(tmp_path):
    for name, colour, text in (("b", BLUE, "a blue wall\na wall in blue\n"), ("a", RED, "a red wall")):
        write(tmp_path, f"{name}.png", colour)
        write(tmp_path, f"{name}.txt", text)
    first, second = served(PromptFile(str(tmp_path), height=16, width=16))
    assert (first.id, first.text, first.image.getpixel((0, 0))) == ("a", "a red wall", RED)
    assert (second.text, second.captions) == ("a blue wall", ("a blue wall", "a wall in blue"))
    write(tmp_path, "c.jpg", RED)
    with pytest.raises(ValueError, match=r"1 of the 3 pictures .* \(c.jpg for one\); write NAME.txt .* metadata.jsonl"):
        PromptFile(str(tmp_path)).check()


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.batches = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def predict_step(self, batch, batch_idx):
        self.batches.append([sample.id for sample in batch])


def test_broken_pictures_are_reported_and_left_out(tmp_path):
    write(tmp_path, "a.png", RED)
    write(tmp_path, "b.png", "<html>404</html>")
    rows = [{"prompt": "x", "image": "a.png"}, {"prompt": "y", "control_image": "b.png"}, {"prompt": "z"}]
    data, model = PromptFile(write(tmp_path, "prompts.jsonl", rows)), Recorder()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.warns(UserWarning, match=r"b\.png cannot be read: .*; it is left out"):
        trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **options)
        trainer.predict(model, data, return_predictions=False)
    assert model.batches == [["1"], [], ["3"]]


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "\n# nothing\n", r"a\.txt holds no prompts; write one"),
        ("a.xlsx", "", r"a\.xlsx ends with \.xlsx; give a \.txt file \(a prompt a line\), a \.csv, \.tsv or \.jsonl"),
        ("a", "", "ends with no suffix; give"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"\n', r"line 3 is not JSON \(.*\); give an object"),
        ("a.jsonl", '["x"]', "line 1 holds a list; give an object a line"),
        ("a.jsonl", '{"promt": "x"}', "line 1 has no prompt; give it one, an `image` or a `class_label`"),
        ("a.jsonl", '{"prompt": 3}', "prompt in .* line 1 is 3; give a text"),
        ("a.jsonl", '{"prompt": "x", "negative_prompt": ["y"]}', r"negative_prompt in .* is \['y'\]; give a text"),
        ("a.jsonl", '{"prompt": "x", "caption": [1]}', r"caption in .* is \[1\]; give a text or a list of texts"),
        ("a.jsonl", '{"prompt": "x", "text": "y"}', r"cannot be told apart \(prompt\); name each once, with"),
        ("a.jsonl", '{"prompt": "x", "image": ["a", "b"]}', r"is \['a', 'b'\]; give the path of a picture\."),
        ("a.jsonl", '{"prompt": "x", "control_image": [1]}', "give the path of a picture or a list of such"),
        ("a.jsonl", '{"id": "1-1", "prompt": "x"}\n{"id": 1, "prompt": "x", "images": 2}', "id 1-1 twice, in line 1"),
        ("a.csv", "", r"a\.csv holds no prompts"),
        ("a.csv", "prompt,seed\n", r"a\.csv holds no prompts"),
        ("a.csv", "caption,seed\nx,1\n", r"no column `prompt` \(its columns: caption, seed\); name the column of the"),
        ("a.csv", "prompt,seed,seed\nx,1,2\n", r"cannot be told apart \(seed\)"),
        ("a.csv", "prompt,\nx,1\n", r"cannot be told apart \(without a name\)"),
        ("a.csv", "prompt,seed\nx,1\na ball, red,1\n", "line 3 has 3 cells and the header 2; put texts that"),
        ("a.csv", 'prompt\n"x" y\n', r"line 2 is no row of a table \(.*\); put texts that hold quotes"),
        ("a.csv", "prompt,seed\nx,1\n,2\n", "line 3 has no prompt"),
        ("a.csv", "prompt,seed\nx,one\n", "seed in .*, line 2 is 'one'; give a whole number from 0 up"),
        ("a.csv", "prompt,seed\nx,-1\n", "seed in .* is -1; give a whole number from 0 up"),
        ("a.csv", "prompt,images\nx,0\n", "images in .*, line 2 is 0; give a whole number from 1 up"),
        ("a.csv", "prompt,images\nx,1.5\n", "images in .* is 1.5"),
        ("a.csv", "prompt,guidance_scale\nx,high\n", "guidance_scale in .*, line 2 is 'high'; give a number"),
        ("a.csv", "prompt,strength\nx,NaN\n", "strength in .* is nan; give a number"),
        ("a.csv", "prompt,steps\nx,10\n", "line 2 sets steps, which all samples of a run have in common; leave"),
        ("a.csv", "prompt,id\nx,1\ny,1\n", "has the id 1 twice, in line 2 and line 3; give each prompt"),
        ("a.csv", "prompt,image\nx,a.png\ny,b.png\n", r"2 of the 2 pictures .* are missing \(.*a\.png, in line 2, for"),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_in_one_sentence(name, content, sentence, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=sentence) as caught:
        PromptFile(path).check()
    message = str(caught.value)
    assert path in message
    assert message.endswith(".")
    # one sentence: no full stop before a capital letter
    assert not re.search(r"\. [A-Z]", message)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not text in UTF-8 \(.*\); save it in UTF-8"):
        PromptFile(str(tmp_path / "a.txt")).check()
    with pytest.raises(ValueError, match=r"nowhere\.txt is neither a file nor a folder; give a \.txt file"):
        PromptFile(str(tmp_path / "nowhere.txt")).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 of the 0 pictures in the folder"):
        PromptFile(str(tmp_path / "empty")).check()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"max_prompts": 0}, "max_prompts is 0; give a number from 1 up, or null for all prompts"),
        ({"images_per_prompt": 0}, r"images_per_prompt is 0; give a number from 1 up\."),
        ({"height": 64}, "height is 64 and width null; give both, or null for both"),
        ({"height": 64, "width": 60}, "width is 60 pixels; give a multiple of 8"),
        ({"fit": "cover"}, "fit is 'cover'; give crop, pad or stretch"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments_are_told_with_the_remedy(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        PromptFile("demo", **kwargs).check()
