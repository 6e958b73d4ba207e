import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from asyncdiff_pl.metrics.ssim import ssim


def test_each_sample_has_its_own_and_a_clip_the_mean_of_its_frames():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 3, 3, 16, 24, generator=generator)
    clips = (reference + 0.2 * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    clips[1] = reference[1]
    found = ssim(clips, reference)
    frames = [structural_similarity_index_measure(clips[0, [i]], reference[0, [i]], data_range=1.0) for i in range(3)]
    assert found.tolist() == pytest.approx([torch.stack(frames).mean().item(), 1.0], abs=1e-5)
    assert ssim(clips[:, 0], reference[:, 0])[0] == pytest.approx(frames[0].item(), abs=1e-5)
    assert 0.1 < found[0] < 0.95


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 24), "of one shape; given are"),
        ((3, 16, 16), (3, 16, 16), "of one shape; given are"),
        ((1, 3, 8, 16), (1, 3, 8, 16), "11 x 11 pixels or more; given are 16 x 8"),
    ],
)
def test_what_does_not_compare_is_refused(first, second, sentence):
    with pytest.raises(ValueError, match=sentence):
        ssim(torch.rand(first), torch.rand(second))
