"""Pictures of a batch that several ranks decode, over gloo and in one process."""

import dataclasses

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    VQModel,
)
from ranks import run_ranks
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.sharing import SharedFrames, SharedPictures, decodes_pictures, shared_decoding


def autoencoder():
    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=(32, 32), norm_num_groups=8).eval()


def count_pictures(vae):
    """How many pictures are decoded at a time in this process."""
    decode, counts = vae._decode, []

    def counted(latents, *args, **kwargs):
        counts.append(len(latents))
        return decode(latents, *args, **kwargs)

    vae._decode = counted
    return counts


def latents_of(batch, size=8):
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(batch))


# -- one rank ------------------------------------------------------------------------------------------------------


def test_pictures_come_as_from_slices():
    vae, sliced = autoencoder(), autoencoder()
    sliced.enable_slicing()
    counts = count_pictures(vae)
    shared = SharedPictures(vae)
    expected = sliced.decode(latents_of(3)).sample
    assert torch.equal(vae.decode(latents_of(3)).sample, expected)
    assert torch.equal(vae.decode(z=latents_of(3), return_dict=False)[0], expected)
    assert counts == [1] * 6
    whole = autoencoder().decode(latents_of(3)).sample
    torch.testing.assert_close(expected, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    shared.remove()
    counts.clear()
    assert torch.equal(vae.decode(latents_of(3)).sample, whole)
    assert counts == [3]
    assert "decode" not in vars(vae)


def test_what_replaced_the_method_since_stays():
    vae = autoencoder()
    shared = SharedPictures(vae)
    vae.decode = own = lambda latents: latents
    shared.remove()
    assert vae.decode is own


@pytest.mark.parametrize(
    ("kind", "decodes"),
    [
        (AutoencoderKL, True),
        (AutoencoderTiny, True),
        # it blends the picture that was given into the one that is made
        (AsymmetricAutoencoderKL, False),
        # it draws noise for the whole batch
        (ConsistencyDecoderVAE, False),
        # it blends the frames of a batch
        (AutoencoderKLTemporalDecoder, False),
        (VQModel, False),
    ],
)
def test_which_autoencoders_decode_pictures_independently(kind, decodes):
    with torch.device("meta"):
        assert decodes_pictures(kind()) is decodes


def test_frames_are_never_taken_for_pictures():
    """AnimateDiff's autoencoder is one of pictures, and its pipeline decodes frames in chunks."""
    assert shared_decoding(Sample("animatediff").pipe, None, 0, 1) == []
    assert shared_decoding(Sample("flux").denoiser, None, 0, 1) == []
    (shared,) = shared_decoding(Sample("sd15").pipe, None, 0, 1)
    assert isinstance(shared, SharedPictures) and not isinstance(shared, SharedFrames)


# -- several -------------------------------------------------------------------------------------------------------


# name of a pipeline, and pictures at once: of five, of one, which each decodes, and of two, so that a rank has none
BATCHES = {("sd15", 5): [2, 2, 1], ("sd15", 1): [1, 1, 1], ("dit", 2): [1, 1, 0]}


def sample_of(name, batch):
    """Pictures, not latents."""
    sample = Sample(name)
    sample.case = dataclasses.replace(sample.case, batch=batch)
    sample.more["output_type"] = "pt"
    return sample


def play(rank, expected):
    for batch, counts in BATCHES.items():
        sample = sample_of(*batch)
        own = count_pictures(sample.pipe.vae)
        handle = parallelize(sample.pipe, stages=3, warm_up=10, share_decoding=True)
        assert torch.equal(sample(), expected[batch])
        assert own == [1] * counts[rank]
        handle.remove()
        assert "decode" not in vars(sample.pipe.vae)


def test_ranks_decode_some_pictures_each_and_get_all():
    """To the bit as one rank."""
    expected = {}
    for batch in BATCHES:
        sample = sample_of(*batch)
        handle = parallelize(sample.pipe, share_decoding=True)
        expected[batch] = sample()
        handle.remove()
    run_ranks(3, play, expected)
