"""Plots what solvers need to come near one step after the other: PSNR against iterations, for each number of steps."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from parallel_in_time_rows import MEMORIES, ORDERS, TOLERANCES, Cell, Job, Setting

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {1: "#999999", 20: "#0072B2", None: "#D55E00"}
STYLES = dict(zip(MEMORIES, (":", "-", "--"), strict=True))
MARKERS = dict(zip(MEMORIES, ("o", "s", "^"), strict=True))


def plot(cells: dict[Job, Cell], path: Path) -> None:
    """A panel for each model and number of steps; a line joins the tolerances of one order and memory.

    Args:
        cells: What was measured.
        path: PNG to write.
    """
    models = list(dict.fromkeys(job.model for job in cells))
    numbers = sorted({job.steps for job in cells})
    figure, grid = plt.subplots(
        len(numbers), len(models), figsize=(4.2 * len(models) + 2.6, 3.2 * len(numbers)), dpi=130, squeeze=False
    )
    handles: dict[str, object] = {}
    for (row, steps), (column, model) in ((a, b) for a in enumerate(numbers) for b in enumerate(models)):
        axes = grid[row, column]
        kinds = [("triangular_anderson", order, memory) for order in reversed(ORDERS) for memory in MEMORIES]
        for method, order, memory in [*kinds, ("picard", None, 2)]:
            settings = [Setting(method, order, memory, tolerance) for tolerance in TOLERANCES]
            here = [cells[job] for setting in settings if (job := Job(model, steps, setting)) in cells]
            if not here:
                continue
            is_picard = method == "picard"
            name = "ParaDiGMS" if is_picard else f"order {order or 'N'}, memory {memory}"
            (line,) = axes.plot(
                [cell.iterations for cell in here],
                [cell.psnr_db for cell in here],
                color="#009E73" if is_picard else COLOURS[order],
                linestyle="-" if is_picard else STYLES[memory],
                marker="D" if is_picard else MARKERS[memory],
                markersize=4,
                linewidth=1.2,
            )
            handles.setdefault(name, line)
        axes.axvline(steps / 4, color="0.6", linewidth=0.8, zorder=0)
        axes.axhline(30, color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(f"{model}, {steps} steps", fontsize=10)
        axes.set_xlim(0, steps)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid[-1]:
        axes.set_xlabel("iterations, mean over samples")
    for axes in grid[:, 0]:
        axes.set_ylabel("PSNR, dB")
    figure.tight_layout(rect=(0, 0.03, 1 - 1.9 / figure.get_figwidth(), 1))
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="center right")
    text = "marks: tolerances .1, .01 and .001; grey lines: a quarter of the steps, and 30 dB"
    figure.text(0.01, 0.005, text, fontsize=7, color="0.4")
    figure.savefig(path)
    plt.close(figure)
