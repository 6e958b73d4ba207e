"""The table of a report: a line for each run, with what it took and how it compares with one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncdiff_pl.callbacks.sample_table import Row, cell
from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference
from asyncdiff_pl.report.picture_measures import Tools, measure_pair
from asyncdiff_pl.report.run_folders import Run, reference_of

COLUMNS = (
    *("work", "layout", "devices", "steps", "samples", "state", "step_latency_ms", "step_latency_ms_error"),
    *("seconds", "seconds_error", "speed_up", "step_speed_up", "psnr_db", "psnr_db_error", "equal", "lpips"),
    *("lpips_error", "score", "score_error", "score_difference", "score_difference_error", "scorer"),
    *("peak_memory_gib", "mib_per_step", "device", "folder"),
)
"""Columns of report.csv; an `_error` is the standard error of the mean before it, over samples."""


@dataclass
class Entry:
    """One line of the table.

    Args:
        run: The run.
        reference: The run of one device that it is compared with; None where there is none.
        step_latency: Time of a step in ms, over timed samples.
        seconds: Time of a sample in s, over timed samples.
        score: Score of the samples.
        scorer: What scored them.
        psnr: PSNR against the reference in dB, over the samples that differ; None where none do, or none are compared.
        equal: How many samples are pixel by pixel the reference's; None where they are not compared.
        compared: How many samples were compared.
        lpips: LPIPS against the reference.
        score_difference: Score less that of the same samples of the reference.
    """

    run: Run
    reference: Run | None
    step_latency: Mean | None
    seconds: Mean | None
    score: Mean | None
    scorer: str
    psnr: Mean | None = None
    equal: int | None = None
    compared: int = 0
    lpips: Mean | None = None
    score_difference: Mean | None = None

    @property
    def is_reference(self) -> bool:
        """Whether the others are compared with this one."""
        return self.reference is self.run

    def speed_up(self, reference: Entry | None) -> float | None:
        """How many times as fast a whole sample is as with the reference; None of a simulation."""
        return _ratio(self, reference, "seconds")

    def step_speed_up(self, reference: Entry | None) -> float | None:
        """The same of a step."""
        return _ratio(self, reference, "step_latency")


def entries_of(group: Sequence[Run], tools: Tools) -> list[Entry]:
    """The lines of runs that did the same work; all numbers are of samples that were made.

    Args:
        group: The runs.
        tools: What compares pictures.
    """
    entries = []
    for run in group:
        timed = [row for row in run.rows if row.get("timed") == "True"]
        scorers = {row["scorer"] for row in run.rows if row.get("score")}
        scorer = scorers.pop() if len(scorers) == 1 else ""
        entry = Entry(
            run,
            reference_of(run, group),
            mean_of(timed, "step_latency_ms"),
            mean_of(timed, "seconds"),
            mean_of(run.rows, "score") if scorer else None,
            scorer,
        )
        if entry.reference is not None and not entry.is_reference:
            _compare(entry, entry.reference, tools)
        entries.append(entry)
    return entries


def reference_entry(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The line of the run that a line is compared with."""
    return next((other for other in entries if other.run is entry.reference), None)


def mean_of(rows: Sequence[Row], column: str) -> Mean | None:
    """Mean of a column with its standard error, which one row alone does not have; infinite values are left out."""
    values = [float(row[column]) for row in rows if row.get(column)]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    return mean_with_error(torch.tensor(values)) if len(values) > 1 else Mean(values[0], math.nan)


def _compare(entry: Entry, reference: Run, tools: Tools) -> None:
    """Fills in what is measured against the reference, sample by sample."""
    first, second = reference.pictures, entry.run.pictures
    keys = [key for key in second.rows if key in first.rows]
    rows = [measure_pair(first, second, (key, key), tools) for key in keys]
    compared = [row for row in rows if row.get("psnr_db")]
    if compared:
        entry.compared = len(compared)
        entry.equal = sum(row["equal"] == "1" for row in compared)
        entry.psnr = mean_of(compared, "psnr_db")
        entry.lpips = mean_of(compared, "lpips")
    scored = [row for row in rows if row["score_a"] and row["score_b"] and row["scorer_a"] == row["scorer_b"]]
    if scored:
        a, b = (torch.tensor([float(row[f"score_{which}"]) for row in scored], dtype=torch.float64) for which in "ab")
        many = len(scored) > 1
        entry.score_difference = paired_difference(b, a) if many else Mean((b - a).item(), math.nan)


def _ratio(entry: Entry, reference: Entry | None, name: str) -> float | None:
    if reference is None or entry.run.is_simulated:
        return None
    own, other = getattr(entry, name), getattr(reference, name)
    return None if own is None or other is None else other.value / own.value


def state_of(run: Run) -> str:
    """Whether a run is finished, in a word."""
    return "finished" if run.is_finished else "unfinished"


def as_row(work: str, entry: Entry, entries: Sequence[Entry]) -> Row:
    """A line as a row of report.csv; a cell is empty where there is nothing that was measured.

    Args:
        work: What the runs of the group computed, in words.
        entry: The line.
        entries: All lines of the group.
    """
    run, reference = entry.run, reference_entry(entry, entries)
    row = {
        "work": work,
        "layout": run.label,
        "devices": str(run.devices),
        "steps": str(run.steps),
        "samples": str(len(run.rows)),
        "state": state_of(run),
        "speed_up": cell(entry.speed_up(reference)),
        "step_speed_up": cell(entry.step_speed_up(reference)),
        "equal": cell(entry.equal),
        "scorer": entry.scorer,
        "peak_memory_gib": run.described.get("peak_memory_gib", ""),
        "mib_per_step": run.described.get("mib_per_step", ""),
        "device": run.described.get("device", ""),
        "folder": str(run.folder),
    }
    means = {
        "step_latency_ms": entry.step_latency,
        "seconds": entry.seconds,
        "psnr_db": entry.psnr,
        "lpips": entry.lpips,
        "score": entry.score,
        "score_difference": entry.score_difference,
    }
    for name, mean in means.items():
        if mean is not None:
            row[name] = cell(mean.value)
            row[f"{name}_error"] = "" if math.isnan(mean.standard_error) else cell(mean.standard_error)
    return row
