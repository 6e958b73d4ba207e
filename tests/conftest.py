import os
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    # a shell starts a background job with SIGINT ignored, and every process that the tests start would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_environment():
    # a Trainer of several ranks leaves LOCAL_RANK behind, which every later one takes for a start by torchrun
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
