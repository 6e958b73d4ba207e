"""Whole runs with several ranks, each started as a user does: few, since each takes seconds."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIMULATED = ("--trainer.devices", "1", "--trainer.strategy.simulate", "true")
COCO = Path(__file__).parents[2] / ".." / "shared" / "data" / "coco"


def wait_for_rows(log, number, process):
    while log.rows_so_far() < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_killed_run_goes_on(command, reference):
    process = command.start(command.arguments())
    log = command.log()
    wait_for_rows(log, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    command.finish(process)
    # the other rank dies with the one that started it
    assert command.processes_left() == []
    rows = (log.path / "samples.part0.csv").read_text().splitlines()[1:]
    assert 2 <= len(rows) < 6
    # its settings are taken from the log folder
    outcome = command.finish(command.start(["predict", "--resume", str(log.path)]))
    assert outcome.status == 0, outcome.err
    assert f"{len(rows)} samples are done" in outcome.out
    assert outcome.out.count(" (4 steps): ") == 6 - len(rows)
    # what was written is as it was written, times included
    assert set(rows) <= set((log.path / "samples.csv").read_text().splitlines())
    # to the bit what one process that plays both ranks makes
    assert log.samples() == reference.samples()
    assert log.pictures() == reference.pictures()
    assert command.processes_left() == []


def test_ctrl_c_says_how_to_go_on(command):
    process = command.start(command.arguments("--model.num_inference_steps", "20", "--clip_score.model", "null"))
    log = command.log()
    wait_for_rows(log, 1, process)
    # a terminal sends it to all processes of the run
    os.killpg(process.pid, signal.SIGINT)
    outcome = command.finish(process)
    assert outcome.status == 130
    assert outcome.seconds < 5
    assert outcome.out.splitlines()[-1] == f"Stopped; what is done is kept. Go on with: --resume {log.path}"
    assert "Traceback" not in outcome.err
    assert command.processes_left() == []


def test_an_error_of_all_ranks_is_said_once(command):
    arguments = ("--trainer.strategy.cut", '[["conv_in"], ["nonsense"]]', "--model.num_inference_steps", "3")
    outcome = command.as_user(*arguments, "--clip_score.model", "null")
    assert outcome.status == 2
    sentence = "The cut names 'nonsense' in stage 1, but no unit of the denoiser has that name."
    assert outcome.own_errors == [f"asyncdiff_pl: error: {sentence}"]
    assert "Traceback" not in outcome.err
    assert command.processes_left() == []
    # what a user is warned of comes in one line, once
    (warned,) = [line for line in outcome.err.splitlines() if "denoising steps" in line]
    assert warned.startswith("asyncdiff_pl: With 3 denoising steps, warm_up 3 leaves none for 2 stages to gain time in")


def test_torchrun_and_an_error_of_all_ranks_that_are_not_connected(command, torchrun):
    outcome = command.as_user("--data.images_dir", "nowhere", launcher=torchrun)
    assert outcome.status != 0
    assert len(outcome.own_errors) == 1
    assert "images_dir nowhere is not a folder" in outcome.own_errors[0]
    assert outcome.own_tracebacks == []
    assert command.processes_left() == []


def test_two_nodes(command, reference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    node = [sys.executable, "-m", *node, "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", command.folder.name]
    world = ("--trainer.num_nodes", "2", "--trainer.devices", "2")
    agents = [command.start(command.arguments(*world), node) for _ in range(2)]
    outcomes = [command.finish(agent) for agent in agents]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    log = command.log()
    # each sample once, and the same from 2 data groups as from one
    assert log.samples() == reference.samples()
    assert log.pictures() == reference.pictures()
    assert [row["rank"] for row in log.table("devices.csv")] == ["0", "1", "2", "3"]
    (result,) = log.table("results.csv")
    assert (result["samples"], result["world_size"], result["data_groups"]) == ("6", "4", "2")
    assert command.processes_left() == []


@pytest.mark.skipif(not COCO.is_dir(), reason="needs COCO's captions and some of its images")
def test_coco_over_two_step_counts(command):
    coco = ("--data.images_dir", str(COCO / "val2017"), "--data.annotations", str(COCO / "captions_val2017.json"))
    with pytest.warns(UserWarning, match="With 3 denoising steps, warm_up 3 leaves none for 2 stages to gain time in"):
        command.here(*SIMULATED, *coco, "--data.max_images", "4", "--model.num_inference_steps", "[3,5]")
    log = command.log()
    results = log.table("results.csv")
    assert [row["steps"] for row in results] == ["3", "5"]
    assert list(results[0])[:5] == ["steps", "avg_score", "std_score", "avg_time", "std_time"]
    samples = log.table("samples.csv")
    assert len(samples) == 8
    captions = json.loads((COCO / "captions_val2017.json").read_text())
    assert {int(row["id"]) for row in samples} <= {image["id"] for image in captions["images"]}
    for row in samples:
        folder = log.path / "frames" / f"steps={row['steps']}"
        for frame in sorted((folder / row["id"]).iterdir()):
            with Image.open(frame) as picture:
                picture.load()
                assert picture.size == (64, 64)
        with Image.open(folder / f"{row['id']}.gif") as animation:
            assert animation.n_frames == 2
    events = EventAccumulator(str(log.path), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    for row in results:
        scorer = f"score/{row['scorer']}/steps={row['steps']}"
        shown = [event.value for event in events.Scalars(scorer)]
        expected = [float(sample["score"]) for sample in samples if sample["steps"] == row["steps"]]
        assert shown == pytest.approx(expected, abs=1e-3)
        assert f"step_latency_ms/steps={row['steps']}" in tags["histograms"]
        curve = events.Scalars(f"step_latency_ms/curve/steps={row['steps']}")
        assert len(curve) == int(row["steps"])
        assert all(event.value > 0 for event in curve)
    for sample in samples:
        assert {f"conditioning/{sample['id']}", f"generated/{sample['id']}"} <= set(tags["images"])
