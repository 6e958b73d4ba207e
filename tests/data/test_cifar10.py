"""Small pictures from all their sources, and which of them come in which batch."""

import hashlib
import io
import itertools
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asyncdiff_pl.data import Cifar10, image_sets
from asyncdiff_pl.data.cifar10 import PickedPictures

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10"


def colours(number):
    """Pictures [N, 3, 32, 32] of one colour each, and their labels."""
    images = np.zeros((number, 3, 32, 32), dtype=np.uint8)
    images[:, 0] = (np.arange(number) * 7 % 256)[:, None, None]
    images[:, 2, :, :16] = 200  # left differs from right
    return images, np.arange(number) % 10


def write_batches(folder):
    folder.mkdir(parents=True)
    images, labels = colours(30)
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        part = slice(5 * number, 5 * number + 5)
        content = {"data": images[part].reshape(5, -1), "labels": labels[part].tolist(), "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_jpegs(folder):
    for part, numbers in (("train", range(25)), ("test", range(25, 30))):
        images, labels = colours(30)
        files = []
        for number in numbers:
            file = io.BytesIO()
            Image.fromarray(images[number].transpose(1, 2, 0)).save(file, "JPEG", quality=100, subsampling=0)
            files.append(file.getvalue())
        offset = np.cumsum([0, *map(len, files)])
        jpeg = np.frombuffer(b"".join(files), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", jpeg=jpeg, offset=offset, label=labels[list(numbers)])


def write_pictures(folder):
    images, _ = colours(30)
    for number, image in enumerate(images):
        part = folder / ("train" if number < 25 else "test") / f"class{number % 2}"
        part.mkdir(parents=True, exist_ok=True)
        # larger than what is served
        Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.NEAREST).save(
            part / f"{number:02}.png"
        )


SOURCES = {
    "batches": write_batches,
    "batches' parent": lambda folder: write_batches(folder / "cifar-10-batches-py"),
    "jpegs": lambda folder: (folder.mkdir(), write_jpegs(folder)),
    "pictures": write_pictures,
}


def reds(images):
    return sorted(images[:, 0, 0, -1].int().tolist())


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, tmp_path):
    SOURCES[name](tmp_path / "set")
    data = Cifar10(str(tmp_path / "set"), batch_size=5)
    data.check()
    data.setup("fit")
    train, test = data._sets["train"], data._sets["test"]
    assert train.images.shape == (25, 3, 32, 32)
    assert test.images.shape == (5, 3, 32, 32)
    expected = colours(30)[0][:, 0, 0, 0].astype(int)
    assert reds(train.images) == pytest.approx(sorted(expected[:25]), abs=3)
    assert reds(test.images) == pytest.approx(sorted(expected[25:]), abs=3)
    # rows and columns are where they were
    assert train.images[0, 2, :, 8].float().mean() == pytest.approx(200, abs=6)
    assert train.images[0, 2, :, 24].float().mean() == pytest.approx(0, abs=6)
    if name != "pictures":
        assert train.labels.tolist() == [i % 10 for i in range(25)]
    else:
        assert sorted(train.labels.tolist()) == [0] * 13 + [1] * 12


@pytest.mark.parametrize("last", [True, False], ids=["N H W 3", "N 3 H W"])
def test_one_file_of_generated_pictures(last, tmp_path):
    images = colours(6)[0]
    np.savez(tmp_path / "made.npz", images=images.transpose(0, 2, 3, 1) if last else images)
    data = Cifar10(str(tmp_path / "made.npz"), batch_size=2)
    with pytest.warns(UserWarning, match="has no test pictures: the validation loss is that of training pictures"):
        data.setup("fit")
    assert torch.equal(data._sets["train"].images, torch.from_numpy(images))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the set is not there")
def test_the_real_set(tmp_path):
    with np.load(SHARED / "test.npz") as arrays:
        files = np.split(arrays["jpeg"], arrays["offset"][1:-1])[::40]
        label = arrays["label"][::40]
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "test.npz", jpeg=np.concatenate(files), offset=offset, label=label)
    found = image_sets.read_archive(tmp_path / "test.npz")
    assert found.images.shape == (250, 3, 32, 32)
    assert set(found.labels.tolist()) == set(range(10))
    assert found.images.float().mean((0, 2, 3)).tolist() == pytest.approx([126, 124, 115], abs=12)


def test_a_download_is_checked_and_unpacked(tmp_path, monkeypatch):
    write_batches(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(image_sets, "ARCHIVE_URL", archive.as_uri())
    data = Cifar10(str(tmp_path / "own"), download=True, batch_size=5)
    with pytest.raises(ValueError, match=f"has the MD5 sum .*, not {image_sets.ARCHIVE_MD5}; try again"):
        data.prepare_data()
    assert list((tmp_path / "own").iterdir()) == []
    monkeypatch.setattr(image_sets, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    data.prepare_data()
    data.setup("fit")
    assert data.num_images == 25
    monkeypatch.setattr(image_sets, "ARCHIVE_URL", "file:///nowhere/x.tar.gz")
    data.prepare_data()  # it is there


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(ValueError, match=r"is no batch of CIFAR-10 \(it holds builtins.print\)"):
        image_sets.read_batches([tmp_path / "data_batch_1"])


def first(picked, number):
    return list(itertools.islice(picked, number))


def test_an_epoch_has_each_picture_once_over_all_ranks():
    ranks = [first(PickedPictures(24, 3, rank, 2, seed=5), 8) for rank in range(2)]
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = torch.cat([batch["index"] for batches in ranks for batch in batches[epoch]])
        assert sorted(seen.tolist()) == list(range(24))
    orders = [torch.cat([batch["index"] for batch in ranks[0][epoch]]) for epoch in (slice(0, 4), slice(4, 8))]
    assert not torch.equal(*orders)
    assert not torch.equal(ranks[0][0]["flipped"], ranks[1][0]["flipped"]) or not torch.equal(
        ranks[0][1]["flipped"], ranks[1][1]["flipped"]
    )


def test_a_run_that_goes_on_has_the_pictures_that_come_next():
    whole = first(PickedPictures(20, 3, seed=1), 15)
    rest = first(PickedPictures(20, 3, seed=1, first=8), 7)
    for a, b in zip(whole[8:], rest, strict=True):
        assert a["number"] == b["number"]
        assert torch.equal(a["index"], b["index"])
        assert torch.equal(a["flipped"], b["flipped"])


def test_batches_are_picked_and_flipped(tmp_path):
    np.savez(tmp_path / "train.npz", images=colours(8)[0], label=np.arange(8))
    np.savez(tmp_path / "test.npz", images=colours(4)[0])
    data = Cifar10(str(tmp_path), batch_size=8)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    frames, index, flipped = batch["frames"], batch["index"], batch["flipped"]
    assert frames.shape == (8, 1, 3, 32, 32)
    assert 0 < flipped.sum() < 8
    assert torch.equal(batch["label"], index)
    assert torch.equal((frames[:, 0, 0, 0, 0] * 255).round().long(), index * 7 % 256)
    # the bright half is left, where it is not flipped
    assert torch.equal(frames[:, 0, 2, 0, 0] > 0.5, ~flipped)
    (only,) = [data.on_after_batch_transfer(part, 0) for part in data.val_dataloader()]
    assert torch.equal((only["frames"][:, 0, 0, 0, 0] * 255).round().long(), torch.arange(4) * 7)
    assert bool((only["frames"][:, 0, 2, 0, 0] > 0.5).all())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; give a number from 1 up"),
        ({"path": "nowhere"}, "nowhere holds neither CIFAR-10's batches nor .npz files nor pictures; give another"),
        ({"batch_size": 9}, "There are 8 training pictures, .* takes 9; set data.batch_size to 8 at most"),
    ],
)
def test_bad_input(arguments, sentence, tmp_path):
    np.savez(tmp_path / "train.npz", images=colours(8)[0])
    np.savez(tmp_path / "test.npz", images=colours(8)[0])
    with pytest.raises(ValueError, match=sentence):
        Cifar10(**{"path": str(tmp_path), **arguments}).setup("fit")


def test_a_file_of_something_else(tmp_path):
    np.savez(tmp_path / "train.npz", pixels=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds pixels \(3,\); it needs `images`"):
        image_sets.read_archive(tmp_path / "train.npz")
