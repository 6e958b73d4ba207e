"""Quality of patches: a table of modes and portions, and whether they come in the order in which they should."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from quality_figures import Comparison, Quality, outcome, paired, pm
from quality_rows import ONE_RANK, PORTIONS, SEND_ROWS, Setting

FRESHER = ("corrected_async_gn", "stale_gn", "sync_gn")
"""Modes with old rows that send statistics too."""

WHAT = {
    "mode": "PSNR rises from naive to separate_gn, to the modes that send statistics, and to full_sync",
    "frozen": "PSNR rises from naive to no_sync, and from no_sync to separate_gn",
    "portion": "PSNR rises with the portion",
    "warm_up": "PSNR rises with warm-up",
}
"""What should hold, by kind of comparison."""


def patches_markdown(quality: Quality) -> list[str]:
    """Tables of PSNR and score of patches, and whether modes, portions and warm-up work as they should."""
    columns = sorted({(setting.patches, setting.warm_up) for setting in quality.patch_settings if setting.warm_up})
    if not columns:
        return []
    # what has no warm-up stands in the columns of all
    rows = dict.fromkeys((setting.mode, setting.portion) for setting in quality.patch_settings)
    lines = ["PSNR against the one-rank result, in dB, in patches:", "", *_head(columns)]
    scores = _head(columns)
    for mode, portion in sorted(rows, key=_rank):
        settings = [_setting(patches, warm_up, mode, portion) for patches, warm_up in columns]
        begin = f"| `{mode}`{f', portion {portion:g}' if portion < 1 else ''} | "
        lines.append(begin + " | ".join(pm(quality.mean_psnr(setting)) for setting in settings) + " |")
        scores.append(begin + " | ".join(pm(quality.score_difference(setting), "+") for setting in settings) + " |")
    if ONE_RANK in quality.score:
        lines += ["", quality.score_title, "", *scores]
    lines.append("")
    comparisons = compare_patches(quality)
    for kind, what in WHAT.items():
        lines += outcome(what, [comparison for comparison in comparisons if comparison.kind == kind])
    return [*lines, ""]


def compare_patches(quality: Quality) -> list[Comparison]:
    """Pairs of modes, portions and warm-ups that differ in one thing, those with fresher or more values first."""
    columns = sorted({(setting.patches, setting.warm_up) for setting in quality.patch_settings if setting.warm_up})
    pairs = [pair for column in columns for pair in _pairs_of(*column)]
    modes = dict.fromkeys((setting.mode, setting.portion) for setting in quality.patch_settings if setting.warm_up)
    for (patches, less), (others, more) in itertools.pairwise(columns):
        if patches == others:
            pairs += [("warm_up", _setting(patches, more, *mode), _setting(patches, less, *mode)) for mode in modes]
    return paired(quality, pairs)


def _pairs_of(patches: int, warm_up: int) -> Iterator[tuple[str, Setting, Setting]]:
    """Kind, better and worse setting of each comparison in one column."""

    def of(mode: str, portion: float = 1.0) -> Setting:
        return _setting(patches, warm_up, mode, portion)

    yield "mode", of("separate_gn"), of("naive")
    for mode in FRESHER:
        yield "mode", of(mode), of("separate_gn")
        yield "mode", of("full_sync"), of(mode)
    yield "frozen", of("no_sync"), of("naive")
    yield "frozen", of("separate_gn"), of("no_sync")
    for more, less in itertools.pairwise((1.0, *PORTIONS)):
        yield "portion", of(SEND_ROWS[0], more), of(SEND_ROWS[0], less)


def _setting(patches: int, warm_up: int, mode: str, portion: float) -> Setting:
    has_warm_up = mode not in ("full_sync", "naive")
    return Setting(1, 1, 1, warm_up if has_warm_up else 0, patches, mode, portion)


def _rank(row: tuple[str, float]) -> tuple[int, float]:
    order = ("full_sync", *SEND_ROWS, "no_sync", "naive")
    return order.index(row[0]), -row[1]


def _head(columns: list[tuple[int, int]]) -> list[str]:
    texts = (f"{patches} patches, warm-up {warm_up}" for patches, warm_up in columns)
    return ["| mode | " + " | ".join(texts) + " |", "|---" * (1 + len(columns)) + "|"]
