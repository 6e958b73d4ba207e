"""Quality on the same number of GPUs with the same warm-up: stages, steps and patches side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from quality_figures import Quality, order, pm
from quality_rows import ONE_RANK, Setting

RANKS = (2, 4)
"""Numbers of GPUs that are compared."""
MODES = ("full_sync", "corrected_async_gn")
"""Modes of patches that are shown: the exact one, and PatchStrategy's first asynchronous one."""
COLOURS = {"stages": "#0072B2", "steps": "#D55E00", "patches": "#009E73"}
# with the guidance batch split over half as many ranks each
MARKERS = {1: "o", 2: "s"}


def ranks_markdown(quality: Quality) -> list[str]:
    """Tables of PSNR and score by number of GPUs; none where one way alone was measured."""
    layouts = {ranks: _layouts(quality, ranks) for ranks in RANKS}
    if len({_way(layout) for each in layouts.values() for layout in each}) < 2:
        return []
    warm_ups = _warm_ups(quality)
    head = "| GPUs | layout | " + " | ".join(f"warm-up {warm_up}" for warm_up in warm_ups) + " |"
    lines = ["PSNR against the one-rank result, in dB, on the same number of GPUs:", ""]
    lines += [head, "|---" * (2 + len(warm_ups)) + "|"]
    scores = [head, "|---" * (2 + len(warm_ups)) + "|"]
    for ranks in RANKS:
        for layout in layouts[ranks]:
            settings = [_setting(layout, warm_up) for warm_up in warm_ups]
            begin = f"| {ranks} | {layout} | "
            lines.append(begin + " | ".join(pm(quality.mean_psnr(setting)) for setting in settings) + " |")
            scores.append(begin + " | ".join(pm(quality.score_difference(setting), "+") for setting in settings) + " |")
    if ONE_RANK in quality.score:
        lines += ["", quality.score_title, "", *scores]
    return [*lines, ""]


def plot_ranks(qualities: Sequence[Quality], path: Path) -> None:
    """PSNR over warm-up, a row for each number of GPUs, a column for each model and a line for each layout.

    What is exact up to rounding (full_sync) lies far above and is left out.

    Args:
        qualities: One or more models.
        path: PNG to write.
    """
    figure, grid = plt.subplots(
        len(RANKS), len(qualities), figsize=(4.2 * len(qualities) + 2.8, 6.4), dpi=130, sharex="col", squeeze=False
    )
    handles: dict[str, object] = {}
    for column, quality in enumerate(qualities):
        for axes, ranks in zip(grid[:, column], RANKS, strict=True):
            for layout in _layouts(quality, ranks):
                if layout.mode == "full_sync":
                    continue
                points = [
                    (warm_up, *mean)
                    for warm_up in _warm_ups(quality)
                    if (mean := quality.mean_psnr(_setting(layout, warm_up)))
                ]
                x, y, error = (torch.tensor(values) for values in zip(*points, strict=True))
                way = _way(layout)
                drawn = axes.errorbar(
                    x,
                    y,
                    yerr=2 * error,
                    color=COLOURS[way],
                    linestyle="--" if layout.cfg > 1 else "-",
                    marker=MARKERS[layout.cfg],
                    markersize=5,
                    linewidth=1.4,
                    elinewidth=1,
                )
                handles.setdefault(f"{'cfg 2 x ' if layout.cfg > 1 else ''}{layout.mode or way}", drawn)
            axes.set_title(f"{quality.model}, {ranks} GPUs", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set(xticks=_warm_ups(quality))
        grid[-1, column].set_xlabel("warm-up, steps")
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR against one rank, dB")
    figure.tight_layout(rect=(0, 0.02, 1 - 2.0 / figure.get_figwidth(), 1))
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="center right")
    figure.text(0.01, 0.005, "bars: 2 standard errors of the mean over samples", fontsize=7, color="0.4")
    figure.savefig(path)
    plt.close(figure)


def _layouts(quality: Quality, ranks: int) -> list[Setting]:
    """Layouts of a number of ranks that were measured, in order; of stages those that repeat no estimate."""
    settings = [setting for setting in quality.settings if setting.ranks == ranks and setting.stride == 1]
    shown = [setting for setting in settings if setting.patches == 1 or _is_shown(setting)]
    return list(dict.fromkeys(setting.layout for setting in sorted(shown, key=order)))


def _is_shown(setting: Setting) -> bool:
    return setting.mode in MODES and setting.portion == 1


def _warm_ups(quality: Quality) -> list[int]:
    return sorted({setting.warm_up for setting in quality.settings if setting.warm_up})


def _setting(layout: Setting, warm_up: int) -> Setting:
    # all its steps are exact: it has the same quality in each column
    return layout if layout.mode == "full_sync" else layout._replace(warm_up=warm_up)


def _way(layout: Setting) -> str:
    return "patches" if layout.patches > 1 else "steps" if layout.at_once > 1 else "stages"
