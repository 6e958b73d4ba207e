"""All tests of the mechanism: helpers that can be imported, one thread and no gradients."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from torch._dynamo.utils import counters

from asyncdiff_pl.parallel import compiling


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are grouped alike here and on ranks, so that results can be compared to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch compiles."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", keep)
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()
