"""No round of steps makes the CPU wait, but for one look a sample: on a device where waiting raises (far_device.py)."""

import dataclasses
from types import SimpleNamespace

import pytest
from far_device import FarDevice, WaitsError, near
from loops import in_loop
from tiny_pipelines import Sample
from torch import nn

from asyncdiff_pl.parallel import parallelize
from asyncdiff_pl.parallel.steps import pipeline
from asyncdiff_pl.parallel.steps.place import Place

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # modules are cast to what they are
    pytest.mark.filterwarnings("ignore:There are modules"),
]


def far_sample(name, device):
    """A pipeline that is on the device, with all its inputs, and whose loop is watched."""
    sample = Sample(name)
    own = sample.kind.inputs
    sample.kind = dataclasses.replace(sample.kind, inputs=lambda *args: device.put(own(*args)))
    for part in vars(sample.pipe).values():
        if isinstance(part, nn.Module):
            device.put(part)
    in_loop(sample.pipe, device.watch)
    return sample


@pytest.mark.parametrize("name", ["sdxl_inpaint", "img2img_heun", "sd15_pndm"])
def test_no_round_waits(name, monkeypatch):
    sample, find, places = Sample(name), Place.find, []
    monkeypatch.setattr(Place, "find", lambda *given: places.append(find(*given)) or places[-1])
    handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
    expected = sample()
    handle.remove()
    assert len(places) == 1

    # the look itself, and the answers that come when they were overtaken
    monkeypatch.setattr(Place, "find", lambda *given: places[0])
    monkeypatch.setattr(pipeline, "Answer", lambda answer: SimpleNamespace(read=lambda: False))
    with FarDevice() as device:
        sample = far_sample(name, device)
        handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
        found = near(sample())
        assert handle.asynchronous_steps > 0
        handle.remove()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_look_waits():
    with FarDevice() as device:
        sample = far_sample("sdxl", device)
        handle = parallelize(sample.pipe, steps=2, warm_up=2, simulate=True)
        with pytest.raises(WaitsError) as raised:
            sample()
        handle.remove()
    assert any("place.py" in str(entry.path) for entry in raised.traceback)
