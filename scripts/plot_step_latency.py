"""Draws the curve of step latency over the steps of a sample, one line a run (needs matplotlib).

python scripts/plot_step_latency.py docs/data/h200_svd_step_latency.csv docs/images/step_latency.png --baseline 621.6
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="CSV with columns config, step, ms")
    parser.add_argument("picture", help="PNG to write")
    parser.add_argument("--baseline", type=float, default=None, help="step latency on one GPU, in ms")
    options = parser.parse_args()
    curves: dict[str, list[float]] = defaultdict(list)
    with open(options.table, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves[row["config"]].append(float(row["ms"]))
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=120)
    if options.baseline is not None:
        axes.axhline(options.baseline, color="0.5", linestyle="--", label=f"one GPU: {options.baseline:.0f} ms")
    for name in sorted(curves, key=lambda name: -sum(curves[name])):
        values = curves[name]
        style = "." if min(values) < 1 else "-"
        axes.plot(values, style, label=f"{name}: {sum(values) / len(values):.0f} ms on average")
    axes.set(xlabel="denoising step", ylabel="step latency, ms", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
