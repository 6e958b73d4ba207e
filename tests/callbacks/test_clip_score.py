import pytest

from asyncdiff_pl.callbacks import CLIPScore, Results
from asyncdiff_pl.callbacks.sample_table import read_table
from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.clip import load_clip


def test_every_sample_is_scored_and_the_scorer_is_named(run):
    callback = CLIPScore("tiny-clip", batch_size=2)
    predictions = run([Results(), callback])
    rows = read_table(run.folder / "samples.csv")
    score = TextImageScore(*load_clip("tiny-clip"))
    for (prediction,), row in zip(predictions, rows, strict=True):
        expected = score(prediction.frames, prediction.sample.captions).item()
        assert float(row["score"]) == pytest.approx(expected, abs=1e-3)
        assert row["scorer"] == callback.scorer
    (result,) = read_table(run.folder / "results.csv")
    assert result["scorer"] == callback.scorer
    scalars = run.events().Scalars(f"score/{callback.scorer}/steps=2")
    assert [event.value for event in scalars] == pytest.approx([float(row["score"]) for row in rows], abs=1e-3)


def test_pictures_of_random_weights_are_not_scored(run, tiny_predictor):
    ((prediction,),) = run([Results(), CLIPScore("tiny-clip")], tiny_predictor(weights="random"), ids=("1",))
    assert "score" not in prediction.metrics
    (row,) = read_table(run.folder / "samples.csv")
    assert not row["score"]
    (result,) = read_table(run.folder / "results.csv")
    assert not result["avg_score"]
    assert result["weights"] == "random"
    assert result["scorer"] == "none (random weights)"


def test_samples_without_captions_get_no_score_and_one_word(run):
    with pytest.warns(UserWarning, match=r"Sample 1 has no captions: such samples get no score\.") as told:
        run([Results(), CLIPScore("tiny-clip")], ids=("1", "2"), captions=())
    assert sum("has no captions" in str(warning.message) for warning in told) == 1
    assert [row["score"] for row in read_table(run.folder / "samples.csv")] == ["", ""]


@pytest.mark.parametrize(
    ("model", "scorers"),
    [
        ("tiny-clip", ("CLIP score (tiny-clip)", "CLIP score (tiny-clip, random weights)")),
        ("openai/clip-vit-large-patch14", ("CLIP score (openai/clip-vit-large-patch14)",)),
        (None, ("none",)),
    ],
)
def test_a_score_is_named_after_its_model(model, scorers):
    assert CLIPScore(model).scorer in scorers


def test_a_batch_without_frames_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        CLIPScore(batch_size=0)
