"""What a run chooses for itself, a layout and a cut by measured times: said, written down, and kept on resume."""

import json
import shutil

import pytest

from asyncdiff_pl.parallel.stages import costs

AUTO = ("--trainer.strategy.stages", "1", "--trainer.strategy.layout", "auto")
MEASURED = ("--trainer.strategy.balance", "measured")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, with the embedded models that are put together already."""
    monkeypatch.setenv("ASYNCDIFF_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


def test_a_layout_is_chosen_said_and_written_down(command):
    outcome = command.as_user(*AUTO, "--data.max_images", "1", "--model.num_inference_steps", "6")
    assert outcome.status == 0, outcome.err
    log = command.log()
    kept = json.loads((log.path / "layout.json").read_text())
    # half of the guidance batch for each of the 2 ranks: exact, and faster in warm-up
    assert (kept["stages"], kept["stride"], kept["cfg"], kept["basis"]) == (1, 1, 2, "counted operations")
    assert [candidate["layout"] for candidate in kept["candidates"]] == ["cfg 2 x 1 stage", "2 stages"]
    said = outcome.out + outcome.err
    assert f"layout (by counted operations): {kept['reason']}" in said
    assert kept["reason"].endswith("of the time of 2 stages, and it is exact.")
    (marked,) = [line for line in said.splitlines() if line.startswith("*")]
    assert "cfg 2 x 1 stage" in marked
    (row,) = log.table("results.csv")
    chosen = {name: row[name] for name in ("layout", "stages", "stride", "cfg", "world_size", "data_groups")}
    assert chosen == {"layout": "auto", "stages": "1", "stride": "1", "cfg": "2", "world_size": "2", "data_groups": "1"}


def in_one_process(command, monkeypatch, slow, *more):
    """A run whose clock shows one unit to be slow."""
    clock = lambda device: lambda name, run: (run(), 10**6 if name == slow else 1000)[1]  # noqa: E731
    monkeypatch.setattr(costs, "stopwatch_for", clock)
    one = ("--trainer.devices", "1", "--trainer.strategy.simulate", "true", "--clip_score.model", "null")
    command.here(*one, *MEASURED, "--model.num_inference_steps", "2", "--trainer.strategy.warm_up", "1", *more)


def test_a_measured_cut_is_written_down_and_kept(command, monkeypatch, cache):
    in_one_process(command, monkeypatch, "conv_out", "--data.max_images", "1")
    folder = command.log().path
    cut = json.loads((folder / "cut.json").read_text())
    written = json.loads((folder / "costs.json").read_text())
    assert set(written[0]) == {"unit", "ms", "share", "stage"}
    (slow,) = [cost for cost in written if cost["unit"] == "conv_out"]
    assert slow["ms"] == 1.0
    assert sum(cost["share"] for cost in written) == pytest.approx(1)
    assert {cost["stage"] for cost in written} == {0, 1}
    assert "conv_out" in cut[slow["stage"]]
    # another clock would cut elsewhere
    shutil.rmtree(cache)
    in_one_process(command, monkeypatch, "mid_block.resnets.0", "--data.max_images", "2", "--resume", str(folder))
    assert not cache.exists()
    assert json.loads((folder / "cut.json").read_text()) == cut
    assert json.loads((folder / "costs.json").read_text()) == written
    before, after = (command.log().table("results.csv")[0] for _ in range(2))
    assert before["cut"] == after["cut"] != ""
    assert after["samples"] == "2"
    in_one_process(command, monkeypatch, "mid_block.resnets.0", "--data.max_images", "1")
    assert json.loads((command.log(version=1).path / "cut.json").read_text()) != cut
