"""What to run on how many GPUs: one sentence for each number of them, from what was measured alone."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdiff_pl.report.report_table import Entry, reference_entry

ERRORS = 2
"""Standard errors by which a score may be below that of one GPU before it counts as lower."""

ON_CPU = (
    "No layout is recommended from these runs: they ran on a CPU, where ranks share the cores, so that their times say "
    "nothing of GPUs; their pictures and scores do."
)


def advise(entries: Sequence[Entry]) -> list[str]:
    """The recommendations: for each number of GPUs the fastest layout, among those whose score is not lower.

    A score is lower that is below one GPU's on the same samples by more than `ERRORS` standard errors. Where every
    layout's is, the one that loses least is taken. Unfinished and simulated runs count for nothing, and what is slower
    than one GPU is not recommended.

    Args:
        entries: Lines of runs that did the same work.

    Returns:
        Sentences; why there are none, if there are none.
    """
    if not any(entry.run.is_on_gpus for entry in entries):
        return [ON_CPU]
    usable = [e for e in entries if e.run.is_finished and not e.run.is_simulated and e.seconds is not None]
    if not any(entry.is_reference for entry in usable):
        return ["No layout is recommended: there is no finished run of one GPU, not compiled, to compare with."]
    told = []
    for devices in sorted({entry.run.devices for entry in usable}):
        clauses: dict[str, list[str]] = {}
        steps = sorted({entry.run.steps for entry in usable if entry.run.devices == devices})
        for number in steps:
            candidates = [e for e in usable if e.run.devices == devices and e.run.steps == number]
            candidates = [e for e in candidates if reference_entry(e, usable) is not None]
            faster = [e for e in candidates if devices == 1 or (e.speed_up(reference_entry(e, usable)) or 0) > 1]
            # one GPU with nothing beside it is no choice
            if any(not entry.is_reference for entry in faster):
                label, gain = _choose(faster, usable)
                clauses.setdefault(label, []).append(f"with {number} steps {gain}" if len(steps) > 1 else gain)
        where = "1 GPU" if devices == 1 else f"{devices} GPUs"
        if clauses:
            texts = [f"{label}: {', '.join(gains)}" for label, gains in clauses.items()]
            told.append(f"On {where} take {'; '.join(texts)}.")
        elif devices > 1:
            told.append(f"On {where} nothing that was measured is faster than on one.")
    return told or ["No layout is recommended: nothing beside one GPU ran to its end."]


def _choose(candidates: Sequence[Entry], entries: Sequence[Entry]) -> tuple[str, str]:
    """Label of the layout to take, and what it gains and costs."""
    good = [entry for entry in candidates if not _is_lower(entry)]
    if good:
        best = min(good, key=lambda entry: entry.seconds.value if entry.seconds else 0.0)
    else:
        best = max(candidates, key=lambda entry: entry.score_difference.value if entry.score_difference else 0.0)
    if best.is_reference:
        return best.run.label, "nothing else that was measured on one is faster at no lower score"
    reference = reference_entry(best, entries)
    gain = best.speed_up(reference)
    assert reference is not None
    assert gain is not None
    return best.run.label, f"{gain:.1f}× {_cost(best)}{_beside_compiled(best, entries)}"


def _is_lower(entry: Entry) -> bool:
    difference = entry.score_difference
    # without an error, of one sample, nothing is known to be lower
    return difference is not None and not entry.run.is_random and difference.in_standard_errors < -ERRORS


def _cost(entry: Entry) -> str:
    if entry.run.is_random:
        return "(its quality is not known: the weights are random)"
    if entry.compared and entry.equal == entry.compared:
        return "with the same pictures"
    parts = []
    if entry.score_difference is not None:
        lower = ", a lower score than one GPU's" if _is_lower(entry) else ""
        value = f"{entry.score_difference.value:+.2f}".replace("-", "−")
        parts.append(f"at {value} {entry.scorer or 'score'}{lower}")
    if entry.psnr is not None:
        parts.append(f"PSNR {entry.psnr.value:.1f} dB")
    return ", ".join(parts) or "(its quality was not measured)"


def _beside_compiled(entry: Entry, entries: Sequence[Entry]) -> str:
    """How much is left of a gain beside one GPU that compiles."""
    run = entry.run
    compiled = [e for e in entries if e.run.devices == 1 and e.run.is_compiled and e.run.steps == run.steps]
    if not compiled or run.devices == 1:
        return ""
    fastest = min(compiled, key=lambda other: other.seconds.value if other.seconds else 0.0)
    return f" ({entry.speed_up(fastest):.1f}× beside one GPU compiled)"
