"""Real pictures as files and in one file, what is kept of them, and precision and recall of a run."""

import logging
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from asyncdiff_pl.cache import cache_folder
from asyncdiff_pl.callbacks import FrechetDistance, PrecisionRecall, Results
from asyncdiff_pl.callbacks.real_pictures import RealPictures
from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.metrics import precision_recall


class Colours(nn.Module):
    """The mean of each colour; it counts the pictures that it has seen."""

    seen = 0

    def forward(self, pictures):
        Colours.seen += len(pictures)
        return pictures.double().mean((2, 3)) / 255


@pytest.fixture
def colours(monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "cache"))
    return f"{__name__}.Colours"


def write_archive(path, number=12, size=16, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (number, size, size, 3)).astype(np.uint8)
    np.savez(path, images=images)
    return images


def test_pictures_of_all_sources_are_the_same(tmp_path):
    images = write_archive(tmp_path / "set.npz", 10, 32)
    (tmp_path / "files").mkdir()
    (tmp_path / "batches").mkdir()
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "files" / f"{index}.png")
    for number in range(5):
        rows = images[2 * number : 2 * number + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        with (tmp_path / "batches" / f"data_batch_{number + 1}").open("wb") as file:
            pickle.dump({"data": rows, "labels": [0, 1]}, file)
    os.rename(tmp_path / "set.npz", tmp_path / "train.npz")
    for path in (tmp_path / "train.npz", tmp_path, tmp_path / "files", tmp_path / "batches"):
        RealPictures(path).check()
        found = [frame for part in RealPictures(path).read((32, 32)) for frame in part]
        assert [np.array_equal(frame, pixels) for frame, pixels in zip(found, images, strict=True)] == [True] * 10
        # every other one of 5 that are spread evenly
        chosen = [frame for part in RealPictures(path, 5).read((32, 32), 1, 2) for frame in part]
        assert [np.array_equal(frame, images[place]) for frame, place in zip(chosen, (2, 6), strict=True)] == [True] * 2
        ((small, *_),) = RealPictures(path, 2).read((8, 16))
        assert small.size == (8, 16)


def test_precision_and_recall_are_columns_of_the_results(run, colours, tiny_predictor, tmp_path):
    images = write_archive(tmp_path / "real.npz")
    callback = PrecisionRecall(str(tmp_path / "real.npz"), colours, neighbours=2)
    predictions = run([Results(), callback], tiny_predictor([3, 2]))
    expected = precision_recall.PrecisionRecall(Colours(), 2)
    expected.add([Image.fromarray(pixels) for pixels in images], is_real=True)
    for batch in predictions:
        for prediction in batch:
            if prediction.steps == 3:
                expected.add(prediction.frames, is_real=False)
    rows = read_table(run.folder / "results.csv")
    for name, value in expected.compute()._asdict().items():
        assert float(rows[1][f"{name} ({colours})"]) == pytest.approx(value, abs=1e-4)
        assert [event.step for event in run.events().Scalars(f"results/{name} ({colours})")] == [2, 3]


@pytest.mark.parametrize("kind", [FrechetDistance, PrecisionRecall])
def test_what_is_needed_of_real_pictures_is_kept(kind, run, colours, tmp_path, monkeypatch):
    path = tmp_path / "real.npz"
    write_archive(path)

    def measured(folder, **settings):
        Colours.seen = 0
        callback = kind(str(path), colours, **settings)
        type(run)(tmp_path / folder)([callback])
        # torchmetrics asks for the number of features
        return callback.step_metrics[2], Colours.seen - (kind is FrechetDistance)

    first, seen = measured("1")
    assert seen == 12 + 9
    assert measured("2") == (first, 9)
    other, seen = measured("3", max_real=6)
    assert seen == 6 + 9
    assert other != first
    write_archive(path, seed=1)
    changed, seen = measured("4")
    assert seen == 12 + 9
    assert changed != first or kind is PrecisionRecall
    # a file of which a part is missing is made again
    for file in (cache_folder() / "statistics").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:50])
    assert measured("5") == (changed, 12 + 9)


def test_too_few_pictures_are_told(run, colours, tmp_path, caplog):
    write_archive(tmp_path / "real.npz", 3)
    with caplog.at_level(logging.WARNING, logger="asyncdiff_pl"):
        run([Results(), PrecisionRecall(str(tmp_path / "real.npz"), colours)])
    assert "they need 4 pictures of each kind, and there are 9 generated and 3 real ones" in caplog.text
    assert not [name for name in read_table(run.folder / "results.csv")[0] if name.startswith("precision")]


def test_bad_sources(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt is no .npz file; give one, or a folder of real pictures"):
        PrecisionRecall(str(tmp_path / "x.pt")).check()
    with pytest.raises(ValueError, match=r"There is no file vgg16-397923af.pth of a feature network"):
        write_archive(tmp_path / "real.npz")
        PrecisionRecall(str(tmp_path / "real.npz")).check()
    with pytest.raises(ValueError, match="neighbours is 0; give a number from 1 up"):
        PrecisionRecall(neighbours=0)
    PrecisionRecall().check()
