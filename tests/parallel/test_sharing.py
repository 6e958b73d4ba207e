"""Videos that several ranks decode together, over gloo."""

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from ranks import run_ranks
from tiny_pipelines import Sample

from asyncdiff_pl.data import sample as data
from asyncdiff_pl.models import VideoPredictor
from asyncdiff_pl.parallel import Groups, Layout, parallelize
from asyncdiff_pl.parallel.sharing import decodes_frames
from asyncdiff_pl.strategies import AsyncDiffStrategy

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


def play(rank, folder, settings, counts, expected):
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


def play_film(rank, counts, expected):
    pipe = Sample("animatediff").pipe
    own = count_frames(pipe)
    handle = parallelize(pipe, share_decoding=True, stages=2)
    for found, whole in zip(film_all(pipe), expected, strict=True):
        assert torch.equal(found, whole)
    assert own == counts[rank]
    handle.remove()


def predict(module):
    (prediction,) = module.predict_step([data.Sample("a", image=Image.new("RGB", (64, 64), (90, 160, 30)))])
    return np.stack([np.asarray(frame) for frame in prediction.frames])


def build_predictor(folder):
    module = VideoPredictor(folder, num_frames=3, num_inference_steps=1, decode_chunk_size=1, dtype="float32")
    module.configure_model()
    return module


def play_predictor(rank, folder, expected):
    module, strategy = build_predictor(folder), AsyncDiffStrategy(stages=2)
    strategy._groups = Groups.build(Layout(stages=2).over(2))
    handle = strategy.install(module)
    own = count_frames(module.pipeline)
    assert np.array_equal(predict(module), expected)
    assert own == [[1, 1], [1]][rank]
    handle.remove()


# frames that each rank decodes; of the third video there is one chunk, which nobody shares
OF_TWO = [[2, 1, 2, 2, 4, 2], [2, 2, 4, 1]]
OF_THREE = [[2, 2, 4, 2], [2, 2, 4, 1], [1, 2, 4]]


def play_all(rank, folder, video, film, prediction):
    play(rank, folder, {"cfg": 2}, OF_TWO, video)
    play_film(rank, OF_TWO, film)
    play_predictor(rank, folder, prediction)


def test_two_ranks_decode_together_to_the_bit(small_svd):
    """Stable Video Diffusion, AnimateDiff, and what a strategy makes of a module."""
    video, film = decode_all(load(small_svd)), film_all(Sample("animatediff").pipe)
    run_ranks(2, play_all, small_svd, video, film, predict(build_predictor(small_svd)))


def test_ranks_without_a_chunk_get_all_frames(small_svd):
    run_ranks(3, play, small_svd, {"stages": 3}, OF_THREE, decode_all(load(small_svd)))


def test_only_chunks_of_frames_are_shared(small_svd):
    assert decodes_frames(load(small_svd))
    assert decodes_frames(Sample("animatediff").pipe)
    assert not decodes_frames(Sample("sd15").pipe)
    assert not decodes_frames(Sample("flux").denoiser)
