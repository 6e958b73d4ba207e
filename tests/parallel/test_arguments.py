"""A denoiser's arguments, given by place or by name."""

import pytest

from asyncdiff_pl.parallel.arguments import Arguments


def forward(sample, timestep, context=None, **others):
    """A denoiser's, as far as its signature goes."""


@pytest.mark.parametrize(
    ("inputs", "name", "found", "replaced"),
    [
        (((1, 2), {}), "timestep", 2, ((1, 9), {})),
        (((1,), {"timestep": 2, "context": 3}), "timestep", 2, ((1,), {"timestep": 9, "context": 3})),
        (((1, 2), {}), "context", None, ((1, 2), {"context": 9})),
        # of no place, or not known at all
        (((1, 2, 3), {"other": 4}), "other", 4, ((1, 2, 3), {"other": 9})),
        (((1, 2, 3, 4), {}), "nothing", None, ((1, 2, 3, 4), {"nothing": 9})),
    ],
)
def test_arguments_are_found_and_replaced_where_they_stand(inputs, name, found, replaced):
    arguments = Arguments(forward)
    assert arguments.find(inputs, name) == found
    assert arguments.replace(inputs, name, 9) == replaced
