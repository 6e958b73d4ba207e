import os

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    # a Trainer of several ranks leaves LOCAL_RANK behind, which every later one takes for a start by torchrun
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
