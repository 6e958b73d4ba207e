"""The axes of the world, as tables; no process is started."""

import pytest

from asyncdiff_pl.parallel import Layout


@pytest.mark.parametrize(
    ("settings", "ranks_per_half", "pipeline_ranks", "world_size"),
    [
        ({}, 1, 1, 1),
        ({"stages": 3}, 3, 3, 3),
        ({"stages": 3, "stride": 2}, 4, 4, 4),
        ({"stages": 2, "cfg": 2}, 2, 4, 4),
        ({"stages": 2, "stride": 2, "cfg": 2}, 3, 6, 6),
        ({"cfg": 2, "data": 3}, 1, 2, 6),
        ({"stages": 8, "data": 2}, 8, 8, 16),
        ({"patches": 4}, 4, 4, 4),
        ({"patches": 9}, 9, 9, 9),
        ({"patches": 3, "cfg": 2, "data": 2}, 3, 6, 12),
    ],
)
def test_sizes(settings, ranks_per_half, pipeline_ranks, world_size):
    layout = Layout(**settings)
    assert (layout.ranks_per_half, layout.pipeline_ranks, layout.world_size) == (
        ranks_per_half,
        pipeline_ranks,
        world_size,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, "stages is 0; it must be from 1 to 8"),
        ({"stages": 9}, "stages is 9; it must be from 1 to 8"),
        ({"stages": 2, "stride": 3}, "stride is 3; it must be 1 or 2"),
        ({"stages": 2, "stride": 0}, "stride is 0; it must be 1 or 2"),
        ({"stride": 2}, "stride 2 needs at least 2 stages"),
        ({"cfg": 3}, r"cfg is 3; it must be 1 .* or 2"),
        ({"patches": 0}, "patches is 0; give 1 or more"),
        ({"patches": 2, "stages": 3}, "stages is 3 and patches 2; set one of them to 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Layout(**settings)


def test_ranks_are_laid_out_pipeline_by_pipeline():
    layout = Layout(stages=2, cfg=2, data=2)
    expected = [(data, half, stage) for data in range(2) for half in range(2) for stage in range(2)]
    assert [layout.coordinates(rank) for rank in range(8)] == expected
    assert [Layout(patches=2, cfg=2, data=2).coordinates(rank) for rank in range(8)] == expected


@pytest.mark.parametrize(
    ("settings", "world_size", "ranks_per_node", "data"),
    [
        ({"stages": 2}, 2, None, 1),
        ({"stages": 2}, 8, None, 4),
        ({"stages": 3, "cfg": 2}, 12, 6, 2),
        ({}, 5, 5, 5),
        ({"patches": 2, "cfg": 2}, 8, 4, 2),
    ],
)
def test_over_a_world(settings, world_size, ranks_per_node, data):
    layout = Layout(**settings).over(world_size, ranks_per_node)
    assert layout == Layout(**settings, data=data)
    assert layout.world_size == world_size


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "message"),
    [
        (4, None, r"cfg 1 x \(stages 3 \+ stride 1 - 1\) = 3 ranks does not fit 4 ranks: start a multiple of 3"),
        (2, None, "does not fit 2 ranks"),
        (12, 4, "must lie within a node, but each node has 4 ranks"),
    ],
)
def test_ranks_that_do_not_fit(world_size, ranks_per_node, message):
    with pytest.raises(ValueError, match=message):
        Layout(stages=3).over(world_size, ranks_per_node)


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "message"),
    [
        (6, None, "cfg 2 x patches 2 = 4 ranks does not fit 6 ranks: start a multiple of 4, or change patches or cfg"),
        (8, 2, "cfg 2 x patches 2 = 4 ranks must lie within a node, but each node has 2 ranks"),
    ],
)
def test_ranks_that_do_not_fit_patches(world_size, ranks_per_node, message):
    with pytest.raises(ValueError, match=message):
        Layout(patches=2, cfg=2).over(world_size, ranks_per_node)
