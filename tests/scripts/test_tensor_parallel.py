"""Tensor parallelism of the benchmark: ranks with shares of the layers compute what one rank computes."""

import pytest
from denoising_jobs import PLAIN, Job, parse, plan
from ranks import run_ranks
from tensor_scenarios import compute_with_shares, replay_in_halves

from asyncdiff_pl.parallel import Layout


def test_shares_compute_what_the_whole_does():
    run_ranks(2, compute_with_shares)


def test_each_half_of_the_guidance_batch_has_ranks_that_share_layers_and_is_recorded():
    run_ranks(4, replay_in_halves)


def test_rows():
    options = ["--layouts", "2xt2", "t4", "1", "--compile", "blocks", "none", "--capture", "off", "on"]
    assert plan(parse([*options, "--device", "cuda"]), 4) == [
        PLAIN,
        *(Job("1", Layout(), "blocks", capture) for capture in (False, True)),
        Job("1", Layout(), capture=True),
        *(Job("2xt2", Layout(cfg=2), capture=capture, tensor=2) for capture in (False, True)),
        *(Job("t4", Layout(), capture=capture, tensor=4) for capture in (False, True)),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["t2", "--compile", "blocks"], "t2 splits layers .* --compile is blocks: add none to it"),
        (["2xt2"], "2xt2 takes cfg 2 x tensor 2 = 4 ranks, which does not fit 2: start a multiple of 4"),
        (["3xt2"], "cfg is 3"),
        (["t1"], "There is no layout t1"),
    ],
)
def test_what_is_not_measured(options, said):
    with pytest.raises(ValueError, match=said):
        plan(parse(["--device", "cpu", "--layouts", *options]), 2)
