"""Pictures reach CLIP's tower as the pipelines and the processor bring them there."""

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from transformers import CLIPProcessor

from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.training.base import to_pil
from asyncdiff_pl.training.pictures import disturb, normalise, resize_as_processor, resize_as_svd


@pytest.mark.parametrize(("height", "width"), [(128, 128), (224, 224), (300, 480), (576, 1024), (128, 600)])
def test_as_the_video_pipeline_resizes(height, width):
    pictures = torch.rand(2, 3, height, width)
    torch.testing.assert_close(resize_as_svd(pictures, 224), _resize_with_antialiasing(pictures, (224, 224)))


@pytest.mark.parametrize("size", [128, 224, 512])
def test_as_the_processor_resizes(size):
    processor = CLIPProcessor.from_pretrained(find_component("scene-clip")).image_processor
    # smooth, as pictures are
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=size, mode="bilinear")[0]
    expected = processor(to_pil(picture), return_tensors="pt").pixel_values
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    found = normalise(resize_as_processor(picture[None], 224), mean, std)
    assert (found - expected).abs().mean() < 0.02


def test_disturbed_pictures_stay_near():
    torch.manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.rand(64, 3, 8, 8), size=64, mode="bilinear")
    found = disturb(pictures)
    assert found.shape == pictures.shape
    assert 0 <= found.min() <= found.max() <= 1
    change = (found - pictures).abs().flatten(1).mean(1)
    assert 0.01 < change.mean() < 0.05
    assert change.max() < 0.12
