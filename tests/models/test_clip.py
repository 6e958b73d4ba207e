import numpy as np
import pytest
import torch
from PIL import Image

from asyncdiff_pl.models.clip import check_clip, is_random, load_clip


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny-clip")


def logits(clip, texts, images):
    model, processor = clip
    inputs = processor(text=texts, images=images, return_tensors="pt")
    return model(**inputs).logits_per_image


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_scores_depend_on_text_and_image(clip):
    texts = ["a dog on a beach", "Two cafés, at night", "日本"]
    scores = logits(clip, texts, [noise(0), Image.new("RGB", (64, 64), "red")])
    assert scores.shape == (2, 3)
    assert scores.isfinite().all()
    assert len(set(scores.flatten().tolist())) == 6


def test_the_processor_pads_and_cuts_long_texts(clip):
    model, processor = clip
    inputs = processor(text=["word " * 100, "dog"], return_tensors="pt")
    assert inputs.input_ids.shape == (2, model.config.text_config.max_position_embeddings)
    end = model.config.text_config.eos_token_id
    assert inputs.input_ids[0, -1] == end
    assert logits(clip, ["word " * 100], [noise(0)]).isfinite().all()


def test_a_short_text_scores_the_same_beside_a_long_one(clip):
    image = noise(0)
    alone = logits(clip, ["dog"], [image])
    beside = logits(clip, ["dog", "a much longer text"], [image])[:, :1]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_weights_are_the_same_each_time(clip):
    again, _ = load_clip("tiny-clip")
    for name, value in clip[0].state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_saved_model_comes_back(clip, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path)
    again = load_clip(str(tmp_path))
    assert not is_random(str(tmp_path))
    assert torch.allclose(logits(clip, ["dog"], [noise(1)]), logits(again, ["dog"], [noise(1)]), rtol=1e-4)


def test_folders_that_are_no_clip_model(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder \./missing; .* or tiny-clip"):
        check_clip("./missing")
    with pytest.raises(ValueError, match="is not a CLIP model's folder"):
        check_clip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a model of type bert; give one of type clip"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="has no weight files"):
        load_clip(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"owner/name is not in the cache and could not be fetched .* give a local"):
        load_clip("owner/name")
