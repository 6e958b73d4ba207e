"""Quality against asynchrony as tables, paired comparisons and a plot."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from quality_figures import Comparison, Quality, gather, order, outcome, paired, pm
from quality_patches import patches_markdown
from quality_ranks import plot_ranks, ranks_markdown
from quality_rows import LAYOUTS, ONE_RANK, STEP_LAYOUTS, Setting, read_rows, write_rows

from asyncdiff_pl.metrics.paired import mean_with_error

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {2: "#0072B2", 3: "#E69F00", 4: "#D55E00"}
CFG_COLOUR = "#000000"


WHAT = {
    "warm_up": "PSNR rises with warm-up",
    "stages": "PSNR falls with stages",
    "at_once": "PSNR falls with steps at a time",
    "against": "PSNR of steps at a time is above that of stages on as many ranks, with equal warm-up",
    "cfg": "PSNR of a split of the guidance batch in two is above that of 4 stages or steps",
}
"""What should hold, by kind of comparison."""


def compare(quality: Quality) -> list[Comparison]:
    """Each warm-up with the next shorter one, each number of stages or steps with the next larger one, and both."""
    pairs = [
        ("warm_up", layout._replace(warm_up=more), layout._replace(warm_up=less))
        for layout in quality.layouts
        for less, more in itertools.pairwise(quality.warm_ups)
    ]
    for warm_up in quality.warm_ups:
        pairs += [
            ("stages", Setting(few, stride, 1, warm_up), Setting(many, stride, 1, warm_up))
            for stride in (1, 2)
            for few, many in ((2, 3), (3, 4))
        ]
        steps = {layout.cfg * layout.at_once: layout._replace(warm_up=warm_up) for layout in STEP_LAYOUTS[:3]}
        halves = STEP_LAYOUTS[-1]._replace(warm_up=warm_up), LAYOUTS[-1]._replace(warm_up=warm_up)
        pairs += [("at_once", steps[few], steps[many]) for few, many in ((2, 3), (3, 4))]
        pairs += [("against", steps[number], Setting(number, 1, 1, warm_up)) for number in steps]
        pairs += [("against", *halves), ("cfg", halves[0], steps[4]), ("cfg", halves[1], Setting(4, 1, 1, warm_up))]
    return paired(quality, pairs)


# -- report -----------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> str:
    """Writes samples.csv, summary.csv, quality.md, quality.png and quality_ranks.png into the folder of the rows.

    The first plot is of stages, the second of the ways side by side; what there is nothing for is left out.

    Returns:
        The text of quality.md.

    Raises:
        ValueError: There are no rows, or rows made under different conditions.
    """
    rows = {(row.model, row.setting, row.sample): row for part in read_rows(folder) for row in part}
    if not rows:
        raise ValueError(f"{folder} holds no samples_*of*.csv with rows; run `measure` into it first.")
    ordered = sorted(rows.values(), key=lambda row: (row.model, order(row.setting), row.sample))
    write_rows(folder / "samples.csv", ordered)
    qualities = gather(ordered)
    write_summary(folder / "summary.csv", qualities)
    text = "\n".join(markdown(quality) for quality in qualities)
    (folder / "quality.md").write_text(text, encoding="utf-8")
    in_stages = [quality for quality in qualities if quality.stage_layouts]
    if in_stages:
        plot(in_stages, folder / "quality.png")
    in_ways = [quality for quality in qualities if ranks_markdown(quality)]
    if in_ways:
        plot_ranks(in_ways, folder / "quality_ranks.png")
    return text


def write_summary(path: Path, qualities: Sequence[Quality]) -> None:
    """A line for each model and setting: means and their standard errors."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        means = [f"{name}{error}" for name in ("psnr_db", "score", "score_difference") for error in ("", "_error")]
        writer.writerow(["model", *Setting._fields, "ranks", "samples", *means])
        for quality in qualities:
            for setting in ([ONE_RANK] if ONE_RANK in quality.score else []) + quality.settings:
                psnr_db = mean_with_error(quality.psnr_db[setting]) if setting != ONE_RANK else ("", "")
                score, difference = mean_with_error(quality.score[setting]), quality.score_difference(setting)
                figures = [*psnr_db, *score, *(difference or ("", ""))]
                numbers = [f"{figure:.4f}" if figure != "" else "" for figure in figures]
                samples = len(quality.score[setting])
                writer.writerow([quality.model, *setting, setting.ranks, samples, *numbers])


def markdown(quality: Quality) -> str:
    """Tables of PSNR and score for one model, and whether warm-up, stages and patches work as they should."""
    lines = [f"### {quality.model}", ""]
    if quality.layouts:
        lines += _layouts(quality)
    lines += patches_markdown(quality)
    lines += ranks_markdown(quality)
    return "\n".join([*lines, ""])


def _layouts(quality: Quality) -> list[str]:
    head = "| layout | ranks | " + " | ".join(f"warm-up {warm_up}" for warm_up in quality.warm_ups) + " |"
    rule = "|---" * (2 + len(quality.warm_ups)) + "|"
    lines = ["PSNR against the one-rank result, in dB:", "", head, rule]
    scores = [head, rule]
    for layout in quality.layouts:
        settings = [layout._replace(warm_up=warm_up) for warm_up in quality.warm_ups]
        begin = f"| {layout} | {layout.ranks} | "
        lines.append(begin + " | ".join(pm(quality.mean_psnr(setting)) for setting in settings) + " |")
        scores.append(begin + " | ".join(pm(quality.score_difference(setting), "+") for setting in settings) + " |")
    if ONE_RANK in quality.score:
        lines += ["", quality.score_title, "", *scores]
    lines.append("")
    comparisons = compare(quality)
    for kind, what in WHAT.items():
        lines += outcome(what, [comparison for comparison in comparisons if comparison.kind == kind])
    return [*lines, *_split_guidance(quality), ""]


def _split_guidance(quality: Quality) -> list[str]:
    """Splitting the guidance batch changes no staleness: it should cost nothing beyond rounding."""
    there, lines = quality.psnr_db, []
    for split, name in ((LAYOUTS[-1], "stages"), (STEP_LAYOUTS[-1], "steps")):
        pairs = [
            (split._replace(warm_up=warm_up), split._replace(cfg=1, warm_up=warm_up)) for warm_up in quality.warm_ups
        ]
        # equal ratios are no gap, even where both are infinite
        gaps = [
            (there[a] - there[b]).abs().masked_fill(there[a] == there[b], 0).max().item()
            for a, b in pairs
            if a in there and b in there
        ]
        if gaps:
            lines.append(
                f"- cfg 2 x 2 {name} against 2 {name}: PSNR differs by at most {max(gaps):.2g} dB in any sample; a "
                "split of the guidance batch is exact up to rounding."
            )
    return lines


def plot(qualities: Sequence[Quality], path: Path) -> None:
    """PSNR and score over warm-up, a line for each layout in stages and a column for each model.

    Args:
        qualities: One or more models, measured in stages.
        path: PNG to write.
    """
    figure, grid = plt.subplots(
        2, len(qualities), figsize=(4.2 * len(qualities) + 2.4, 6.4), dpi=130, sharex="col", squeeze=False
    )
    layouts = list(dict.fromkeys(layout for quality in qualities for layout in quality.stage_layouts))
    for column, quality in enumerate(qualities):
        above, below = grid[:, column]
        for at, layout in enumerate(layouts):
            settings = [setting for setting in quality.whole_settings if setting.layout == layout]
            shift = (at - (len(layouts) - 1) / 2) * 0.07
            for axes, means in (
                (above, [mean_with_error(quality.psnr_db[setting]) for setting in settings]),
                (below, [quality.score_difference(setting) for setting in settings]),
            ):
                points = [(s.warm_up + shift, *mean) for s, mean in zip(settings, means, strict=True) if mean]
                if points:
                    x, y, error = (torch.tensor(values) for values in zip(*points, strict=True))
                    axes.errorbar(x, y, yerr=2 * error, label=f"{layout} ({layout.ranks} ranks)", **_style(layout))
        below.axhline(0, color="0.5", linewidth=0.8, zorder=0)
        above.set_title(quality.model)
        below.set(xlabel="warm-up, steps", xticks=quality.warm_ups)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
    grid[0, 0].set_ylabel("PSNR against one rank, dB")
    grid[1, 0].set_ylabel("CLIP score (tiny-clip)\nless that of one rank")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.02, 1 - 2.3 / figure.get_figwidth(), 1))
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="center right")
    figure.text(0.01, 0.005, "bars: 2 standard errors of the mean over samples", fontsize=7, color="0.4")
    figure.savefig(path)
    plt.close(figure)


def _style(layout: Setting) -> dict[str, object]:
    common = {"linewidth": 1.4, "markersize": 5, "capsize": 0, "elinewidth": 1}
    if layout.cfg > 1:
        # lies on the line of its stages: only the marks can be seen apart
        return common | {
            "color": CFG_COLOUR,
            "linestyle": "",
            "marker": "s",
            "markersize": 8,
            "markerfacecolor": "none",
        }
    face = COLOURS[layout.stages] if layout.stride == 1 else "white"
    style = "-" if layout.stride == 1 else "--"
    return common | {"color": COLOURS[layout.stages], "linestyle": style, "marker": "o", "markerfacecolor": face}
