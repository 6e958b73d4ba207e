import logging

import pytest
import torch
from PIL import Image

from asyncdiff_pl.callbacks import FrameWriter, ReferenceMetrics, Results
from asyncdiff_pl.callbacks.sample_table import read_table, summarise
from asyncdiff_pl.metrics.lpips import alexnet_features


@pytest.fixture
def reference(run, tmp_path):
    """The log folder of a run of three samples; the first frame of sample 2 is another picture."""
    made = type(run)(tmp_path / "reference")
    made([FrameWriter(animation="none")])
    picture = made.folder / "frames" / "steps=2" / "2" / "0000.png"
    with Image.open(picture) as file:
        file.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    return made.folder


def test_each_sample_is_compared_with_its_own_frames(run, reference, caplog):
    with caplog.at_level(logging.WARNING, logger="asyncdiff_pl"):
        run([Results(), ReferenceMetrics(str(reference))], ids=("1", "2", "10", "11"))
    rows = {row["id"]: row for row in read_table(run.folder / "samples.csv")}
    assert [rows[name]["equal"] for name in ("1", "2", "10", "11")] == ["1", "0", "1", ""]
    assert rows["1"]["psnr_db"] == "inf"
    assert 5 < float(rows["2"]["psnr_db"]) < 40
    assert 0.5 < float(rows["2"]["ssim"]) < 0.99
    assert rows["11"]["psnr_db"] == rows["11"]["ssim"] == ""
    assert caplog.text.count("1 of 4 samples have no frames in the reference") == 1
    (result,) = read_table(run.folder / "results.csv")
    # what is equal has no finite PSNR
    assert result["avg_psnr_db"] == rows["2"]["psnr_db"]
    assert float(result["avg_equal"]) == pytest.approx(2 / 3, abs=1e-5)
    assert float(result["avg_ssim"]) == pytest.approx((2 + float(rows["2"]["ssim"])) / 3, abs=1e-5)
    assert result["reference"] == str(reference)
    assert [event.value for event in run.events().Scalars("reference/equal/steps=2")] == [1, 0, 1]


def test_a_run_does_not_go_on_with_another_reference(run, reference, tmp_path):
    run([Results(), ReferenceMetrics(str(reference))])
    with pytest.raises(ValueError, match=r"has reference '.*reference' but this one has None: give the same"):
        run([Results()], ids=("11",))


def test_lpips_takes_its_weights_from_a_file_or_is_left_out(
    run, reference, tmp_path, tiny_predictor, monkeypatch, caplog
):
    weights = {f"features.{name}": tensor for name, tensor in alexnet_features().state_dict().items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    monkeypatch.setattr("asyncdiff_pl.callbacks.reference_metrics.compare_frames", lambda *given: {"lpips": len(given)})
    callback = ReferenceMetrics(str(reference), lpips=str(tmp_path / "alexnet.pth"))
    ((prediction,),) = run([callback], ids=("1",))
    assert prediction.metrics == {"lpips": 5}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("asyncdiff_pl.metrics.lpips.ALEXNET", (tmp_path / "nowhere-7be5be79.pth").as_uri())
    with caplog.at_level(logging.WARNING, logger="asyncdiff_pl"):
        run([ReferenceMetrics(str(reference), lpips="fetch")], ids=("1",))
    assert "There will be no LPIPS: AlexNet's weights for LPIPS could not be fetched" in caplog.text


def test_frames_of_another_number_are_refused_at_the_first_sample(run, reference, tiny_predictor):
    with pytest.raises(ValueError, match=r"Sample 1 .*: The frames are 2 of 16x16, those of the reference 3 of 16x16"):
        run([ReferenceMetrics(str(reference))], tiny_predictor(num_frames=2))


def test_bad_settings(tmp_path, reference):
    with pytest.raises(ValueError, match="There is no folder nowhere to compare with; give a run's log folder"):
        ReferenceMetrics("nowhere").check()
    with pytest.raises(ValueError, match="holds no frames; give the log folder of a run"):
        ReferenceMetrics(str(tmp_path)).check()
    with pytest.raises(ValueError, match="There is no file nowhere for LPIPS"):
        ReferenceMetrics(str(reference), lpips="nowhere").check()
    ReferenceMetrics().check()


def test_every_column_of_numbers_has_its_average_and_words_have_none():
    rows = [
        {"steps": "4", "id": str(i), "timed": "True", "sharpness": value, "note": "x", "psnr_db": "inf"}
        for i, value in enumerate(("1", "", "3"))
    ]
    (summary,) = summarise(rows).values()
    assert (summary["avg_sharpness"], summary["std_sharpness"]) == ("2", "1")
    assert (summary["avg_psnr_db"], summary["std_psnr_db"]) == ("inf", "")
    assert "avg_note" not in summary
