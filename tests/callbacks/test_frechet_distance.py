import logging

import numpy as np
import pytest
from PIL import Image
from torch import nn

from asyncdiff_pl.callbacks import FrameWriter, FrechetDistance, Results
from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.metrics import frechet


class Colours(nn.Module):
    """The mean of each colour."""

    def forward(self, pictures):
        return pictures.double().mean((2, 3)) / 255


@pytest.fixture
def real(tmp_path):
    """Five pictures of noise, larger than what is generated."""
    folder = tmp_path / "real"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def colours():
    return f"{__name__}.Colours"


def test_each_step_count_has_its_distance_named_after_the_network(run, real, colours, tiny_predictor):
    predictions = run([Results(), FrechetDistance(str(real), colours)], tiny_predictor([3, 2]))
    column = f"frechet_distance ({colours})"
    expected = frechet.FrechetDistance(Colours())
    for batch in predictions:
        for prediction in batch:
            if prediction.steps == 3:
                expected.add(prediction.frames, is_real=False)
    for index in range(5):
        with Image.open(real / f"{index}.png") as file:
            # 32 x 24 pixels: what juts out of a square is cut off, and the rest brought to 16 x 16
            expected.add([file.crop((4, 0, 28, 24)).resize((16, 16), Image.Resampling.LANCZOS)], is_real=True)
    rows = read_table(run.folder / "results.csv")
    assert float(rows[1][column]) == pytest.approx(expected.compute(), rel=1e-2)
    assert float(rows[0][column]) > 0
    assert [event.step for event in run.events().Scalars(f"results/{column}")] == [2, 3]


def test_a_run_that_goes_on_counts_the_frames_that_are_there(run, real, colours, tiny_predictor, tmp_path, caplog):
    column = f"frechet_distance ({colours})"

    def parts():
        return [Results(), FrameWriter(animation="none"), FrechetDistance(str(real), colours)]

    whole = type(run)(tmp_path / "whole")
    whole(parts())
    with pytest.raises(RuntimeError):
        run(parts(), tiny_predictor(fail_at="10"))
    run(parts())
    (expected,), (found,) = (read_table(folder / "results.csv") for folder in (whole.folder, run.folder))
    assert float(found[column]) == pytest.approx(float(expected[column]), rel=1e-4)
    # nothing is made: the distance stays
    run(parts())
    assert read_table(run.folder / "results.csv")[0][column] == found[column]

    (run.folder / "frames" / "steps=2" / "2").rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING, logger="asyncdiff_pl"):
        run(parts(), ids=("1", "2", "10", "11"))
    assert not read_table(run.folder / "results.csv")[0].get(column)
    assert "There is no Fréchet distance for 2 steps: of the 3 samples that were made before" in caplog.text


def test_few_pictures_and_a_missing_network_are_told(run, real, colours, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with caplog.at_level(logging.WARNING, logger="asyncdiff_pl"):
        run([Results(), FrechetDistance(str(real))], ids=("1",))
        run([FrechetDistance(str(real), colours, max_real=3)], ids=("1",))
    assert "There will be no Fréchet distance: FID's Inception network cannot be had" in caplog.text
    assert "is of 3 generated and 3 real pictures, fewer than the network's 3 features" in caplog.text
    assert "fid" not in read_table(run.folder / "results.csv")[0]


def test_bad_settings(tmp_path, real):
    with pytest.raises(ValueError, match="There is no folder nowhere of real pictures"):
        FrechetDistance("nowhere").check()
    with pytest.raises(ValueError, match="holds fewer than 2 pictures; give a folder of real pictures"):
        FrechetDistance(str(tmp_path)).check()
    with pytest.raises(ValueError, match=r"There is no file x.pt of a feature network"):
        FrechetDistance(str(real), "x.pt").check()
    with pytest.raises(ValueError, match="max_real is 1; give a number of pictures from 2 up"):
        FrechetDistance(max_real=1)
    FrechetDistance().check()
