import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

from asyncdiff_pl.models.decoding import to_pictures


def test_pictures_are_those_of_diffusers_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    video = 0.8 * torch.randn(1, 3, 4, 24, 16, generator=generator)
    # values that lie between two numbers of a picture, as near as float32 comes
    video[0, 0, 0].view(-1)[:255] = (2 * (torch.arange(255) + 0.5) / 255) - 1
    processor = VideoProcessor(do_resize=True, vae_scale_factor=8)
    expected = processor.postprocess_video(video, output_type="pil")[0]
    found = to_pictures(processor.postprocess_video(video, output_type="pt")[0])
    assert [(picture.mode, picture.size) for picture in found] == [("RGB", (16, 24))] * 4
    for picture, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(other))
