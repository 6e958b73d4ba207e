import gc
import os
import signal

# two tests run at a time, and a CPU's results are equal to the bit at equal thread counts alone: the processes that the
# tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection():
    # tests import all there is, and it stays: to look through it for garbage, now and in each test, only takes time
    gc.disable()


def pytest_collection_modifyitems(items):
    # a minute and more each: begun last, they would have the other processes wait
    items.sort(key=lambda item: item.path.name != "test_ranks.py")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Pipelines of the package are put together below a folder of the tests, those of other processes too."""
    os.environ["ASYNCDIFF_PL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def ctrl_c():
    # a shell starts a background job with SIGINT ignored, Lightning ignores it after a run that it stopped within this
    # process, and every process that the tests start would inherit that
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


@pytest.fixture(autouse=True)
def one_trace():
    # here and below: the process that hands out the tests reads this file too, and need not import torch
    from traces import shared_traces

    with shared_traces():
        yield


@pytest.fixture(scope="session")
def small_svd(tmp_path_factory):
    """Folder of a small Stable Video Diffusion checkpoint with random weights."""
    from checkpoints import save_small_svd

    return str(save_small_svd(tmp_path_factory.mktemp("small_svd")))
