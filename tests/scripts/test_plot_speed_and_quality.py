from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from plot_speed_and_quality import Point, plot, points_of, read_table

DATA = Path(__file__).parents[2] / "docs" / "data"


def time(seconds, setting, **axes):
    row = {"model": "svd", "setting": setting, "is_plain": "0", "loop_s": str(seconds), "warm_up": "", "tensor": ""}
    names = ("stages", "stride", "patches", "cfg", "steps_at_a_time")
    return row | dict.fromkeys(names, "1") | {name: str(value) for name, value in axes.items()}


def psnr(value, **axes):
    row = {"model": "tiny-svd", "mode": "", "portion": "1.0", "psnr_db": str(value), "psnr_db_error": "0.5"}
    names = ("stages", "stride", "cfg", "patches", "at_once")
    return row | dict.fromkeys(names, "1") | {name: str(value) for name, value in axes.items()}


PLAIN = time(15.0, "plain diffusers", is_plain=1)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # what runs exact steps alone needs no measured PSNR
        ([time(6.0, "2x1, captured", cfg=2)], [Point("cfg 2", 2, 6.0)]),
        ([time(9.0, "p2, captured, full_sync", patches=2)], [Point("2 patches", 2, 9.0)]),
        # the last measurement counts, and of several settings the fastest
        (
            [
                time(5.0, "2, captured", stages=2, warm_up=3),
                time(7.0, "2, captured", stages=2, warm_up=3),
                time(8.0, "2", stages=2, warm_up=3),
            ],
            [Point("2 stages", 2, 7.0, 29.0, 0.5)],
        ),
        # halves of the guidance batch lose what the whole batch loses
        ([time(3.0, "2x2, captured", stages=2, cfg=2, warm_up=3)], [Point("cfg 2 × 2 stages", 4, 3.0, 29.0, 0.5)]),
        (
            [time(6.5, "steps2, captured", steps_at_a_time=2, warm_up=3)],
            [Point("2 steps", 2, 6.5, 44.0, 0.5)],
        ),
        # with another warm-up, another mode or split layers no PSNR was measured; one that failed has no seconds
        (
            [
                time(6.0, "2, captured", stages=2, warm_up=5),
                time(6.0, "p2, captured, stale_gn", patches=2, warm_up=3),
                time(6.0, "2, captured, folded", stages=2, warm_up=3),
                time(6.0, "t2, captured", tensor=2),
                time("", "2, captured", stages=2, warm_up=3),
            ],
            [],
        ),
    ],
)
def test_layouts_that_both_models_were_measured_with(times, expected):
    quality = [psnr(29.0, stages=2, warm_up=3), psnr(44.0, at_once=2, warm_up=3), psnr("", warm_up=0)]
    again = time(16.0, "plain diffusers", is_plain=1)
    first, *others = points_of("svd", "tiny-svd", [PLAIN, *times, again], quality)
    assert first == Point("one GPU, plain diffusers", 1, 15.0)
    assert others == expected


def test_the_picture_of_what_is_in_the_docs(tmp_path):
    times, quality = read_table(DATA / "h200_denoising.csv"), read_table(DATA / "quality_tiny_svd.csv")
    points = points_of("svd", "tiny-svd", times, quality)
    assert "2 stages" in {point.label for point in points}
    plot({"SVD-XT": points}, tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 0
