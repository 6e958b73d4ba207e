"""Blocks of a denoiser compiled, with a backend that runs the graphs as they are, so that no number changes."""

import pytest
import torch
from denoisers import TEXT, Sampler, build, ddim
from diffusers import UNet2DConditionModel
from torch import nn

from asyncdiff_pl.parallel import compiling, parallelize
from asyncdiff_pl.parallel.compiling import Compiled, why_not

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.out(self.norm(hidden))


def run_blocks(blocks):
    """Runs each block on an input of its width, compiled and as it is, and compares."""
    parts = {str(at): block for at, block in enumerate(blocks)}
    compiled = Compiled(nn.ModuleList(blocks), parts)
    compiled.prepare(CPU)

    @compiled.allowing_all_kinds
    def run():
        for name, block in parts.items():
            hidden = torch.randn(2, block.out.in_features)
            assert torch.equal(compiled.wrap(name, block.forward)(hidden), block(hidden))

    run()
    run()


def build_small():
    """A denoiser with few kinds of blocks, for a sampler of sd21."""
    torch.manual_seed(3)
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, cross_attention_dim=TEXT, **blocks).eval()


def sample(denoiser, steps=3, **settings):
    """Latents of a sample, and the handle."""
    scheduler = ddim()
    handle = parallelize(denoiser, simulate=True, scheduler=scheduler, **settings)
    return Sampler("sd21")(denoiser, scheduler, steps), handle


def test_equal_blocks_share_one_graph(graphs):
    run_blocks([Block(8) for _ in range(12)])
    assert len(graphs) == 1


def test_a_class_may_have_more_kinds_than_torch_allows(graphs):
    """Torch would run all but the first eight as they are, and say so in its log alone."""
    allowed = torch._dynamo.config.recompile_limit
    run_blocks([Block(8 * (at + 1)) for at in range(allowed + 4)])
    assert len(graphs) == allowed + 4
    assert torch._dynamo.config.recompile_limit == allowed


@pytest.mark.parametrize(
    ("part", "gains"),
    [
        (nn.Conv2d(4, 4, 3), False),
        (nn.Sequential(nn.SiLU(), nn.Linear(4, 4)), False),
        (nn.GroupNorm(2, 4), True),
        (Block(4), True),
    ],
)
def test_a_lone_layer_of_a_library_is_not_compiled(part, gains, graphs):
    compiled = Compiled(part, {"part": part})
    compiled.prepare(CPU)
    assert (compiled.wrap("part", part.forward) != part.forward) == gains


def test_numbers_stay_and_a_second_sample_compiles_nothing(graphs):
    settings = {"stages": 2, "warm_up": 1}
    expected = sample(build("sd21"), **settings)[0]
    denoiser = build("sd21")
    assert torch.equal(sample(denoiser, compile="blocks", **settings)[0], expected)
    kinds = len(graphs)
    blocks = sum(type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D") for module in denoiser.modules())
    assert 0 < kinds < blocks
    assert torch.equal(sample(build("sd21"), compile="blocks", **settings)[0], expected)
    assert len(graphs) == kinds


def test_the_whole_denoiser(graphs):
    denoiser, expected = build_small(), Sampler("sd21")(build_small(), ddim(), 3)
    found, handle = sample(denoiser, compile="full")
    assert torch.equal(found, expected)
    assert len(graphs) == 1
    handle.remove()
    assert "forward" not in vars(denoiser)


def test_removal_gives_the_weights_their_layout_back(graphs, monkeypatch):
    monkeypatch.setattr(compiling, "NHWC_DEVICES", ("cpu",))
    fresh, denoiser = build_small(), build_small()
    expected = Sampler("sd21")(fresh, ddim(), 3)
    found, handle = sample(denoiser, compile="blocks")
    # convolutions sum in another order
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    convolutions = [module for module in denoiser.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.permute(0, 2, 3, 1).is_contiguous() for module in convolutions)
    handle.remove()
    for before, after in zip(fresh.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()
    assert torch.equal(Sampler("sd21")(denoiser, ddim(), 3), expected)


def test_a_machine_without_compiler_is_told_once_and_goes_on(no_compiler):
    expected, denoiser, scheduler = Sampler("sd21")(build_small(), ddim(), 3), build_small(), ddim()
    with pytest.warns(UserWarning, match=r"runs as it is, .* there is no C\+\+ compiler 'g\+\+'") as warned:
        parallelize(denoiser, simulate=True, scheduler=scheduler, compile="blocks")
        Sampler("sd21", size=16)(denoiser, scheduler, 3)
        assert torch.equal(Sampler("sd21")(denoiser, scheduler, 3), expected)
    assert sum("runs as it is" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize(("has_triton", "reason"), [(False, "no Triton"), (True, "no C compiler gcc or clang")])
def test_what_a_gpu_needs(has_triton, reason, no_compiler, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: has_triton)
    assert reason in why_not(torch.device("cuda"))


def test_placeholders_of_other_ranks_weights_stay_small(monkeypatch):
    monkeypatch.setattr(compiling, "NHWC_DEVICES", ("cpu",))
    layer = nn.Conv2d(4, 4, 3)
    layer.weight.data = torch.zeros(1, 1, 1, 1).expand(4, 4, 3, 3)
    Compiled(layer, {"": layer}).prepare(CPU)
    assert layer.weight.untyped_storage().nbytes() == 4
