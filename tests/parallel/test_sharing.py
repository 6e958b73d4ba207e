"""Videos that several ranks decode together, over gloo."""

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from ranks import run_ranks
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.sharing import can_share

SIZE = 8
# videos, frames of each, and frames that are decoded at a time; the last has fewer chunks than three ranks
VIDEOS = [(1, 5, 2), (2, 3, 2), (1, 4, 4), (1, 3, 2)]


def load(folder):
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(videos, frames):
    generator = torch.Generator().manual_seed(videos + frames)
    return torch.randn(videos, frames, 4, SIZE, SIZE, generator=generator)


def decode_all(pipe):
    return [pipe.decode_latents(latents_of(videos, frames), frames, chunk) for videos, frames, chunk in VIDEOS]


def film_all(pipe):
    """AnimateDiff has frames behind channels."""
    latents = [latents_of(videos, frames).transpose(1, 2) for videos, frames, _ in VIDEOS]
    return [pipe.decode_latents(x, chunk) for x, (_, _, chunk) in zip(latents, VIDEOS, strict=True)]


def count_frames(pipe):
    """Frames that this process decodes, chunk by chunk."""
    decode, counts = pipe.vae.decode, []

    def counted(latents, *args, **kwargs):
        counts.append(len(latents))
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = counted
    return counts


def play(rank, folder, settings, expected, counts):
    pipe = load(folder)
    own = count_frames(pipe)
    handle = parallelize(pipe, share_decoding=True, **settings)
    for found, whole in zip(decode_all(pipe), expected, strict=True):
        assert found.shape == whole.shape
        assert torch.equal(found, whole)
    assert own == counts[rank]
    handle.remove()
    assert "decode_latents" not in vars(pipe)
    own.clear()
    assert torch.equal(decode_all(pipe)[0], expected[0])
    assert own == [2, 2, 1, 2, 2, 2, 4, 2, 1]


def play_film(rank, expected, counts):
    pipe = Sample("animatediff").pipe
    own = count_frames(pipe)
    handle = parallelize(pipe, share_decoding=True, stages=2)
    for found, whole in zip(film_all(pipe), expected, strict=True):
        assert torch.equal(found, whole)
    assert own == counts[rank]
    handle.remove()


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        # of the third video there is one chunk, which nobody shares
        ({"cfg": 2}, [[2, 1, 2, 2, 4, 2], [2, 2, 4, 1]]),
        ({"stages": 3}, [[2, 2, 4, 2], [2, 2, 4, 1], [1, 2, 4]]),
    ],
)
def test_ranks_decode_chunks_to_the_bit(small_svd, settings, counts):
    pipe = load(small_svd)
    with torch.no_grad():
        expected = decode_all(pipe)
    run_ranks(len(counts), play, small_svd, settings, expected, counts)


def test_ranks_decode_frames_of_other_pipelines_to_the_bit():
    run_ranks(2, play_film, film_all(Sample("animatediff").pipe), [[2, 1, 2, 2, 4, 2], [2, 2, 4, 1]])


def test_only_chunks_of_frames_are_shared(small_svd):
    assert can_share(load(small_svd))
    assert can_share(Sample("animatediff").pipe)
    assert not can_share(Sample("sd15").pipe)
    assert not can_share(Sample("flux").denoiser)
