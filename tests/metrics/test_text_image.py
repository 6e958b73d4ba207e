import numpy as np
import pytest
import torch
from PIL import Image

from asyncdiff_pl.metrics.text_image import TextImageScore
from asyncdiff_pl.models.clip import load_clip

CAPTIONS = ["a red square", "a dog runs", "blue"]


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny-clip")


@pytest.fixture(scope="module")
def frames():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(5)]


def test_each_pair_is_what_the_model_itself_says(clip, frames):
    model, processor = clip
    expected = []
    for frame in frames:
        for caption in CAPTIONS:
            inputs = processor(text=[caption], images=[frame], return_tensors="pt", padding=True)
            with torch.no_grad():
                expected.append((model(**inputs).logits_per_image / model.logit_scale.exp()).item() * 100)
    score = TextImageScore(model, processor)
    assert score.pairs(frames, CAPTIONS).flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert score(frames, CAPTIONS).item() == pytest.approx(np.mean(expected), abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_the_batch_size_does_not_matter(clip, frames, batch_size):
    assert TextImageScore(*clip, batch_size=batch_size)(frames, CAPTIONS).item() == pytest.approx(
        TextImageScore(*clip)(frames, CAPTIONS).item(), abs=1e-4
    )


def test_half_precision_gives_nearly_the_same(frames):
    score = TextImageScore(*load_clip("tiny-clip"))
    expected = score(frames, CAPTIONS).item()
    found = score.half()(frames, CAPTIONS)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=0.3)


def test_a_score_may_be_negative(clip, frames):
    score = TextImageScore(*clip)
    with torch.no_grad():
        texts = score.embed_texts(CAPTIONS)
        images = score.embed_images(frames)
    assert torch.allclose(score.pairs(frames, CAPTIONS), 100 * images @ texts.T, atol=1e-4)
    score.embed_texts = lambda captions: -images[:1]
    assert score.pairs(frames[:1], CAPTIONS[:1]).item() == pytest.approx(-100, abs=1e-3)


def test_a_long_caption_is_cut_off(clip, frames):
    score = TextImageScore(*clip)
    words = "a very long tale of everything there is " * 40
    assert score(frames, [words]).item() == pytest.approx(score(frames, [words + "and more"]).item(), abs=1e-4)


@pytest.mark.parametrize(("num_frames", "captions"), [(0, CAPTIONS), (2, [])])
def test_nothing_to_score_is_an_error(clip, frames, num_frames, captions):
    with pytest.raises(ValueError, match="frames and captions"):
        TextImageScore(*clip)(frames[:num_frames], captions)
