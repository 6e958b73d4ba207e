import itertools

import pytest

pytest.importorskip("matplotlib")
from plot_schedule import EXAMPLES, boxes_of, plot


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_each_step_gets_one_estimate_and_no_rank_does_two_things_at_once(example):
    boxes, messages, end = boxes_of(example)
    assert sorted(box.step for box in boxes if box.is_estimate) == list(range(example.num_steps))
    for rank in range(example.ranks):
        own = sorted((box.begin, box.begin + box.width) for box in boxes if box.rank == rank)
        assert all(first[1] <= second[0] + 1e-9 for first, second in itertools.pairwise(own))
        assert own[-1][1] <= end + 1e-9
    # nothing is used before it was made
    assert all(sender.begin + sender.width <= receiver.begin + 1e-9 for sender, receiver in messages)


def test_the_picture(tmp_path):
    plot(EXAMPLES[:1], tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 0
