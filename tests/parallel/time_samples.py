"""Samples whose steps are solved together, in one process that plays all ranks."""

from asyncdiff_pl.parallel import TimeParallel, parallelize


def solved(sample, capture=None, **settings):
    """What a pipeline makes, and what is told of it."""
    handle = parallelize(sample.pipe, time=TimeParallel(**settings), simulate=True, capture=capture)
    try:
        return sample(), handle.solved
    finally:
        handle.remove()
