"""The table of layouts that fit some GPUs, for the embedded models at small sizes."""

import csv
import functools
import json

import pytest

from asyncdiff_pl.models import PipelinePredictor, VideoPredictor
from asyncdiff_pl.parallel import Layout, WarmUp
from asyncdiff_pl.parallel.foreseen import LINKS
from asyncdiff_pl.report.plan import MIB, Plan, terms_of
from asyncdiff_pl.strategies import AsyncDiffStrategy, PatchStrategy, StepParallelStrategy, TimeParallelStrategy

SIZE = 128, 64


@functools.cache
def video():
    return VideoPredictor("tiny-svd", num_inference_steps=10, num_frames=2)


@functools.cache
def plan():
    return Plan(video(), AsyncDiffStrategy(stages=2, warm_up=2), SIZE, LINKS["pcie"])


def like(strategy, step_ms=None):
    """A plan with another strategy that takes over what is known of the denoiser."""
    found = Plan(video(), strategy, SIZE, LINKS["pcie"], step_ms)
    found.planner = plan().planner
    return found


def timed(step_ms):
    return like(AsyncDiffStrategy(stages=2), step_ms)


def named(rows):
    return {found.name: found for found in rows}


def test_all_layouts_of_two_gpus():
    rows = plan().rows(2)
    assert [(found.name, found.layout.data) for found in rows] == [
        ("1 GPU", 2),
        ("cfg 2", 1),
        ("2 stages", 1),
        ("2 patches, full_sync", 1),
        ("2 patches, corrected_async_gn", 1),
        ("2 steps", 1),
    ]
    assert [found.name for found in rows if plan().is_own(found)] == ["2 stages"]


def test_pipelines_stay_within_a_machine_and_data_groups_do_not():
    rows = plan().rows(8, num_nodes=4)
    assert {found.layout.pipeline_ranks: found.layout.data for found in rows} == {1: 8, 2: 4}
    assert {found.layout.world_size for found in rows} == {8}
    with pytest.raises(ValueError, match="6 GPUs cannot be shared out evenly over 4 machines"):
        plan().rows(6, num_nodes=4)


def test_what_does_not_fit_is_left_out_with_its_reason():
    # 128 pixels are 32 rows of latents, in multiples of 8
    found = named(plan().rows(8))
    assert found.keys() >= {
        "8 stages",
        "cfg 2 x 4 stages",
        "cfg 2 x 3 stages, stride 2",
        "8 steps",
        "4 patches, full_sync",
    }
    assert not any(name.startswith("8 patches") for name in found)
    assert "\nLeft out\n8 patches: 8 patches do not fit 32 rows of latents" in plan().describe([8])


def test_the_table():
    text = plan().describe([2, 4])
    lines = text.splitlines()
    assert lines[0] == "model    tiny-svd, 64x128, float16"
    assert lines[2].startswith("samples  10 steps; exact at the start: 2 with stages, 4 with patches, 3 with steps")
    assert lines[3] == "link     20 GB/s where ranks wait, 20 beside the computation"
    at = lines.index("2 GPUs")
    assert lines[at + 1].split()[:5] == ["layout", "data", "slowest", "speed-up", "samples"]
    (own,) = [line for line in lines[at : lines.index("4 GPUs")] if line.startswith("* ")]
    stages = named(plan().rows(2))["2 stages"]
    assert own.split()[:6] == ["*", "2", "stages", "1", f"{max(stages.shares):.1%}", f"{stages.speed_up:.2f}"]
    assert f"{stages.sent_bytes / MIB:.1f}" in own
    # a cut begins at the first unit
    (cut,) = [line for line in lines if line.startswith("2 stages") and " | " in line]
    assert "% conv_in | " in cut
    assert "hidden" not in text
    assert "4 GPUs" in lines


def test_with_the_time_of_a_step():
    text = timed(5.0).describe([2])
    assert "one GPU  5 ms a step" in text
    assert "on link" in text
    slow = named(timed(1e-6).rows(2))["2 stages"]
    assert slow.is_hidden(LINKS["pcie"], 1e-6) is False
    assert slow.is_hidden(LINKS["pcie"], 1e6) is True
    assert slow.speed_up_on(LINKS["pcie"], 1e6) == pytest.approx(slow.speed_up, rel=1e-3)


def test_the_csv_has_the_numbers_and_cuts(tmp_path):
    path = tmp_path / "plans" / "plan.csv"
    timed(5.0).write(path, [2, 4])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpus"] for row in rows} == {"2", "4"}
    (row,) = [row for row in rows if row["layout"] == "2 stages" and row["gpus"] == "2"]
    found = named(timed(5.0).rows(2))["2 stages"]
    assert int(row["bytes_per_step"]) == found.sent_bytes
    assert float(row["speed_up"]) == found.speed_up
    assert row["is_own"] == "True"
    assert json.loads(row["cut"]) == found.cut
    # such a cut may be given to the strategy
    given = Plan(video(), AsyncDiffStrategy(stages=2, cut=found.cut), SIZE, LINKS["pcie"])
    assert named(given.rows(2))["2 stages"].sent_bytes == found.sent_bytes


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (AsyncDiffStrategy(2, warm_up=5, refresh_every=3), {"samples": ((10, 5),), "refresh_every": 3}),
        (AsyncDiffStrategy(2, warm_up=WarmUp(until_drift=0.1, at_most=6)), {"samples": ((10, 6),)}),
        (AsyncDiffStrategy(2, warm_up=WarmUp(until_drift=0.1)), {"samples": ((10, 10),)}),
        (PatchStrategy(2, "stale_gn", 2, 0.3), {"mode": "stale_gn", "portion": 0.3, "patch_warm_up": 2}),
        (PatchStrategy(2), {"mode": "corrected_async_gn", "patch_warm_up": 4, "samples": ((10, 3),)}),
        (StepParallelStrategy(2, warm_up=4), {"steps_warm_up": 4, "samples": ((10, 3),)}),
        (TimeParallelStrategy(), {"samples": ((10, 3),)}),
        ("auto", {"samples": ((10, 3),), "folded": False}),
    ],
)
def test_settings_of_the_config(strategy, expected):
    terms = terms_of(strategy, video())
    assert {name: getattr(terms, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        (AsyncDiffStrategy(3, 2, cfg=2), Layout(3, 2, 2)),
        (PatchStrategy(4, cfg=2), Layout(patches=4, cfg=2)),
        (StepParallelStrategy(4), Layout(steps=4)),
        (AsyncDiffStrategy(layout="auto"), None),
        ("auto", None),
    ],
)
def test_the_configs_own_layout_is_marked(strategy, layout):
    ranks = 8 if layout is None else layout.pipeline_ranks
    found = like(strategy)
    marked = [each for each in found.rows(ranks) if found.is_own(each)]
    assert [each.layout for each in marked] == ([] if layout is None else [layout])


def test_a_transformer_has_no_patches_and_no_halves_without_guidance():
    module = PipelinePredictor("tiny-dit", num_inference_steps=10, guidance_scale=1.0)
    found = Plan(module, AsyncDiffStrategy(), (None, None), LINKS["nvlink"])
    text = found.describe([2])
    assert "2 patches: patches are for the UNets of Stable Diffusion, SDXL" in text
    assert [each.name for each in found.rows(2)] == ["1 GPU", "2 stages", "2 steps"]


@pytest.mark.parametrize(
    ("module", "size", "message"),
    [
        (video, (None, 64), "The size of the pictures is not known"),
        (lambda: VideoPredictor("me/unknown"), SIZE, "The architecture of me/unknown is not known here: give a local"),
    ],
)
def test_what_is_not_known_is_told(module, size, message):
    with pytest.raises(ValueError, match=message):
        Plan(module(), AsyncDiffStrategy(), size, LINKS["nvlink"])
