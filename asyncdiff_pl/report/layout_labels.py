"""What layouts are called in a report: by their axes, and by the settings in which runs of the same axes differ."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdiff_pl.report.run_folders import Run

SETTINGS = {
    "warm_up": "warm-up {}",
    "refresh_every": "refresh every {}",
    "time_shift": "time shift",
    "mode": "{}",
    "portion": "portion {}",
    "method": "{}",
    "folded": "folded",
    "balance": "balance {}",
    "warm_up_mode": "warm-up {}",
    "capture": "capture {}",
    "share_encoding": "shared encoding",
    "window": "window {}",
    "order": "order {}",
    "tolerance": "tolerance {}",
    "cut": "cut {}",
}
"""Columns of results.csv that tell runs of the same axes from one another, and how they are told."""


def layout_name(run: Run) -> str:
    """What a run's axes are called: `cfg 2 x 2 stages`; `one GPU` (or `one rank`) where there is nothing to share."""
    layout = run.layout
    parts = [f"cfg {layout.cfg}"] if layout.cfg > 1 else []
    if layout.stages > 1:
        parts.append(f"{layout.stages} stages" + (f" stride {layout.stride}" if layout.stride > 1 else ""))
    if layout.patches > 1:
        parts.append(f"{layout.patches} patches")
    if layout.steps > 1:
        parts.append(f"{layout.steps} steps at a time")
    if run.described.get("strategy") == "time":
        parts.append(f"all steps together on {layout.time}")
    name = " × ".join(parts) or ("one GPU" if run.is_on_gpus else "one rank")
    if run.is_compiled:
        name += f", compiled {run.described['compile']}"
    return f"{name}, simulated" if run.is_simulated else name


def label_runs(runs: Sequence[Run]) -> None:
    """Gives each run of a group a label of its own among those with its step count."""
    for run in runs:
        run.label = layout_name(run)
    labels = {run.label for run in runs}
    for label in labels:
        alike = [run for run in runs if run.label == label]
        differing = [name for name in SETTINGS if len({run.described.get(name, "") for run in alike}) > 1]
        for run in alike:
            told = (_told(name, run.described.get(name, "")) for name in differing)
            run.label = ", ".join([label, *(text for text in told if text)])
    for run in runs:
        others = [other for other in runs if (other.label, other.steps) == (run.label, run.steps)]
        if len(others) > 1:
            for number, other in enumerate(others, 1):
                other.label += f" ({number}: {other.folder.parent.name}/{other.folder.name})"


def _told(name: str, value: str) -> str:
    if value in ("", "False"):
        return ""
    return SETTINGS[name].format(value)
