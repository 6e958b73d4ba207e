"""Sets of pictures in one file each are compared as sets, and sample by sample where they name their pictures."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from asyncdiff_pl.metrics.precision_recall import precision_recall
from asyncdiff_pl.report.compare import compare


class Colours(nn.Module):
    """The mean of each colour."""

    def forward(self, pictures):
        return pictures.double().mean((2, 3)) / 255


def write(path, number, seed, **others):
    images = np.random.default_rng(seed).integers(0, 256, (number, 16, 16, 3)).astype(np.uint8)
    np.savez(path, images=images, **others)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def quantities(folder):
    with (folder / "compare.csv").open(newline="") as file:
        return {row["quantity"]: row for row in csv.DictReader(file)}


def test_sets_without_names(tmp_path):
    real, made = (write(tmp_path / f"{name}.npz", number, number) for name, number in (("real", 9), ("made", 7)))
    network = f"{__name__}.Colours"
    paths = [str(tmp_path / name) for name in ("real.npz", "made.npz")]
    compare(*paths, frechet=network, precision_recall=network, output=str(tmp_path / "out"))
    found = quantities(tmp_path / "out")
    for name, value in precision_recall(Colours()(real), Colours()(made))._asdict().items():
        assert float(found[f"{name} ({network})"]["difference"]) == pytest.approx(value, abs=1e-3)
    assert float(found[f"frechet_distance ({network})"]["difference"]) > 0
    assert (found["samples"]["a"], found["samples"]["b"]) == ("9", "7")
    write(tmp_path / "made.npz", 3, 0)
    told = compare(*paths, precision_recall=network, output=str(tmp_path / "few"))
    assert "no precision and recall: they need 4 pictures or more on each side, and there are 9, 3" in told
    with pytest.raises(ValueError, match=r"\(ids such as real:0 and made:0\); give .* --frechet or --precision_recall"):
        compare(*paths, output=str(tmp_path / "none"))


def test_pictures_that_have_names_are_compared_one_by_one(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.npz", 4, 0, id=np.array(["3", "4", "5", "6"]))
    compare(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), output=str(tmp_path / "out"))
    found = quantities(tmp_path / "out")
    assert found["pixel by pixel the same"]["difference"] == "4 of 4"
    assert (tmp_path / "out" / "compare.png").exists()
