"""Solving steps together makes the CPU wait once an iteration, and a few times a sample: on a device that shows it."""

import collections
import traceback
from pathlib import Path

import pytest
from far_device import FarDevice, near
from test_steps_waits import far_sample
from tiny_pipelines import Sample

from asyncdiff_pl.parallel import TimeParallel, parallelize

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # modules are cast to what they are
    pytest.mark.filterwarnings("ignore:There are modules"),
]


class CountingDevice(FarDevice):
    """Notes which of our files make the CPU wait, and lets it."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def wait(self, function):
        files = [Path(entry.filename) for entry in traceback.extract_stack()]
        ours = [path.name for path in files if "asyncdiff_pl" in path.parts and "tests" not in path.parts]
        self.waits.update(ours[-1:])


def test_one_wait_an_iteration():
    settings = {"time": TimeParallel(ranks=2), "simulate": True}
    sample = Sample("sd15")
    handle = parallelize(sample.pipe, **settings)
    expected = sample()
    handle.remove()
    with CountingDevice() as device:
        sample = far_sample("sd15", device)
        handle = parallelize(sample.pipe, **settings)
        found = near(sample())
        (iterations,) = handle.solved.iterations
        handle.remove()
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert device.waits["windows.py"] == iterations > 1
    # a look at the first step's input and at its guidance, and at the end whether both stayed
    once = {name: device.waits[name] for name in ("place.py", "combination.py", "pipeline.py", "evaluation.py")}
    assert once == {"place.py": 1, "combination.py": 1, "pipeline.py": 1, "evaluation.py": 0}
