"""What ranks of tensor parallelism do in tests/scripts/test_tensor_parallel.py: each process imports this alone."""

import torch
from denoisers import NAMES, Sampler, build, ddim
from denoising_tensor_parallel import TensorParallel, tensor_mesh
from diffusers.models.attention import Attention, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from fake_graph import FakeRecorder, captured

from asyncdiff_pl.parallel import parallelize

CPU = torch.device("cpu")


def difference(found, expected):
    """The largest one, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def num_weights(network):
    """Weights that this process holds."""
    local = [getattr(each, "_local_tensor", each) for each in network.parameters()]
    # shares, and no views of the whole
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in local)
    return sum(each.numel() for each in local)


def blocks():
    """Blocks of 3 heads, 5 units and 3 groups, with their inputs and how much they add up."""
    torch.manual_seed(1)
    resnet = ResnetBlock2D(in_channels=4, out_channels=6, temb_channels=8, groups=2, groups_out=3)
    for parameter in resnet.norm2.parameters():
        torch.nn.init.normal_(parameter)
    return [
        (Attention(6, cross_attention_dim=8, heads=3, dim_head=2), (torch.randn(1, 4, 6), torch.randn(1, 7, 8)), 24),
        (FeedForward(5, mult=1, activation_fn="geglu"), (torch.randn(2, 3, 5),), 30),
        (resnet, (torch.randn(2, 4, 3, 3), torch.randn(2, 8)), 108),
    ]


def compute_with_shares(rank):
    mesh = tensor_mesh(CPU, 2)
    for block, inputs, summed in blocks():
        alone = block.eval()(*inputs)
        shards = TensorParallel(block, mesh)
        assert difference(block(*inputs), alone) < 1e-6, block
        # two ranks: each sends as much as there is
        assert shards.bytes_per_step == 4 * summed
        shards.remove()
        assert block(*inputs).equal(alone)
    for name in NAMES:
        denoiser, sampler = build(name), Sampler(name)
        alone, whole = sampler(denoiser, steps=1), num_weights(denoiser)
        shards = TensorParallel(denoiser, mesh)
        assert difference(sampler(denoiser, steps=1), alone) < 1e-5, name
        # half of what is split, and biases that belong to all
        assert 1 - shards.share / 2 <= num_weights(denoiser) / whole < 1.01 - shards.share / 2
        assert 0.85 < shards.share < 0.96
        shards.remove()
        assert sampler(denoiser, steps=1).equal(alone)
        assert num_weights(denoiser) == whole


def replay_in_halves(rank):
    denoiser, sampler, scheduler = build("sd21"), Sampler("sd21"), ddim()
    alone = sampler(denoiser, scheduler, steps=4)
    shards = TensorParallel(denoiser, tensor_mesh(CPU, 2, cfg=2))
    with captured(FakeRecorder()) as recorder:
        handle = parallelize(denoiser, scheduler=scheduler, cfg=2, capture=True)
        assert difference(sampler(denoiser, scheduler, steps=4), alone) < 1e-5
        assert (handle.num_graphs, recorder.replays) == (1, 3)
        handle.remove()
    shards.remove()
