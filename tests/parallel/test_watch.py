import time
from datetime import timedelta

import pytest
import torch
from ranks import run_ranks

from asyncdiff_pl.parallel.exchange import Exchange, Message
from asyncdiff_pl.parallel.layout import Groups, Layout
from asyncdiff_pl.parallel.stages.worker import Worker
from asyncdiff_pl.parallel.watch import Watch


class Posted:
    def __init__(self, completed):
        self.completed = completed

    def is_completed(self):
        return self.completed


def test_a_lost_message_is_named_once_and_others_are_not():
    lost = []
    watch = Watch(timedelta(seconds=0.2), lost.append, interval=0.05)
    watch.add(Posted(True), "came")
    watch.add(Posted(False), "rank 1, step 7: boundary tensor 3")
    watch.add(Posted(False), "later")
    time.sleep(0.6)
    assert len(lost) == 1
    assert lost[0].startswith("rank 1, step 7: boundary tensor 3")


def test_messages_that_come_in_time_say_nothing():
    lost = []
    watch = Watch(timedelta(seconds=0.2), lost.append, interval=0.05)
    messages = [Posted(False) for _ in range(3)]
    for message in messages:
        watch.add(message, "under way")
    for message in messages:
        message.completed = True
    time.sleep(0.5)
    watch.stop()
    assert lost == []


def wait_for_nobody(rank):
    exchange = Exchange(Groups.build(Layout(stages=2)), timedelta(seconds=2))
    worker = Worker(rank, rank, [5])
    worker.store(5, torch.zeros(3))
    if rank == 0:
        return  # sends nothing
    exchange.begin(worker, [Message(5, source=0, target=1)], step=4)
    exchange.finish()
    worker.turn_over()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1, step 4: boundary tensor 5 from stage rank 0 to 1"):
        worker.read(5)
    assert time.monotonic() - started < 10


def test_a_hang_is_reported_with_rank_step_and_message():
    run_ranks(2, wait_for_nobody)
