"""The report as one HTML file: it holds its pictures and asks nothing of a network, nor of scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from asyncdiff_pl.metrics.paired import Mean
from asyncdiff_pl.report.embedded_pictures import Shown
from asyncdiff_pl.report.report_table import Entry, reference_entry, state_of

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 84rem;
  padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin-top: 2rem; } p, li { max-width: 50rem; overflow-wrap: anywhere; }
.advice { background: #eef5ff; border-left: 4px solid #2563eb; padding: .6rem 1rem; max-width: 50rem; }
.advice p { margin: .2rem 0; } .wide { overflow-x: auto; border: 1px solid #ddd; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { background: #f6f6f6; vertical-align: bottom; } thead th { white-space: normal; min-width: 4rem; }
th:first-child { text-align: left; position: sticky; left: 0; min-width: 8rem; max-width: 16rem; white-space: normal; }
tbody th { background: #fff; font-weight: 500; } tr.reference th, tr.reference td { background: #f4f8ff; }
tr:last-child > * { border-bottom: 0; } .note { color: #666; font-size: .875rem; } .error { color: #777; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.plots figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 11rem), 1fr)); gap: .75rem; }
.pictures figure { margin: 0; } .pictures img { width: 100%; } figcaption { font-size: .8rem; color: #444; }
pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; border-radius: 4px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; } dd { margin: 0; overflow-wrap: anywhere; }
"""

# what is not here already is refused, whatever a picture's title may say
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PLOTS = {
    "pareto_score": "Time of a sample against its score; the line joins what nothing else beats in both. Bars are "
    "standard errors over the samples: how layouts differ on the same samples is known better: see the table.",
    "pareto_psnr": "Time of a sample against how near its pictures are to those of one device with as many steps, "
    "which is not among them. Lines join what nothing else with as many steps beats in both.",
    "steps_score": "Score over the number of steps.",
    "steps_seconds": "Time of a sample over the number of steps.",
    "step_latency": "Time of each step of a sample, at the largest number of steps.",
}
"""What is said under each plot."""


@dataclass
class Section:
    """What the page says of runs that did the same work.

    Args:
        title: What they computed.
        entries: The table's lines.
        advice: Recommendations, a sentence each.
        plots: Each plot by its name, as the value of an `src`.
        samples: Pictures side by side.
        environment: What the runs ran on.
        settings: Settings to start from, as YAML.
        commands: Label and command of each run.
        notes: What else there is to say.
    """

    title: str
    entries: Sequence[Entry]
    advice: Sequence[str]
    plots: Mapping[str, str]
    samples: Sequence[Shown]
    environment: Mapping[str, str]
    settings: str
    commands: Sequence[tuple[str, str]]
    notes: Sequence[str] = field(default_factory=tuple)


def render(title: str, sections: Sequence[Section], failures: Sequence[str]) -> str:
    """The page.

    Args:
        title: Its title.
        sections: What it says, for each kind of work.
        failures: Cells of a sweep that did not come to their end, a sentence each.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(_section(section) for section in sections),
    ]
    if failures:
        parts += ["<h2>Not finished</h2><ul>", *(f"<li>{escape(text)}</li>" for text in failures), "</ul>"]
    return "\n".join([*parts, "</body></html>", ""])


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", '<div class="advice">']
    parts += [f"<p>{escape(sentence)}</p>" for sentence in section.advice]
    parts += ["</div>", "<h3>Layouts</h3>", _table(section.entries), _legend(section.entries)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    if section.plots:
        parts.append('<h3>Plots</h3><div class="plots">')
        for name, source in section.plots.items():
            text = PLOTS[name]
            parts.append(
                f'<figure><img src="{source}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
            )
        parts.append("</div>")
    if section.samples:
        parts.append("<h3>Pictures</h3>")
    for sample in section.samples:
        parts.append(f'<p>{escape(sample.title)}</p><div class="pictures">')
        parts += [
            f'<figure><img src="{source}" alt="{escape(label)}"><figcaption>{escape(label)}</figcaption></figure>'
            for label, source in sample.pictures
        ]
        parts.append("</div>")
    known = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.environment.items())
    parts += ["<h3>Environment</h3><dl>", *known, "</dl>"]
    if section.commands:
        parts.append("<h3>To make these runs again</h3>")
        parts.append(f"<details><summary>reference.yaml</summary><pre>{escape(section.settings)}</pre></details>")
        for label, command in section.commands:
            parts.append(f"<p>{escape(label)}</p><pre>{escape(command)}</pre>")
    return "\n".join(parts)


def _table(entries: Sequence[Entry]) -> str:
    """The table; columns that are empty throughout are left out."""
    rows = [_cells(entry, entries) for entry in entries]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("layout", *columns))
    body = []
    for entry, row in zip(entries, rows, strict=True):
        kind = ' class="reference"' if entry.is_reference else ""
        cells = "".join(f"<td>{row[name]}</td>" for name in columns)
        body.append(f"<tr{kind}><th>{escape(entry.run.label)}</th>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cells(entry: Entry, entries: Sequence[Entry]) -> dict[str, str]:
    run, reference = entry.run, reference_entry(entry, entries)
    name = "GPUs" if run.is_on_gpus else "ranks"
    psnr = _text(entry.psnr)
    if entry.compared and entry.equal == entry.compared:
        psnr = "the same"
    count = str(len(run.rows))
    return {
        name: str(run.layout.pipeline_ranks),
        "steps": str(run.steps),
        "ms a step": _text(entry.step_latency),
        "seconds a sample": _text(entry.seconds),
        "speed-up of a sample": _times(entry.speed_up(reference)),
        "speed-up of a step": _times(entry.step_speed_up(reference)),
        "PSNR, dB": psnr,
        "LPIPS": _text(entry.lpips),
        "score": _text(entry.score),
        "score beside one device's": _text(entry.score_difference, "+"),
        "peak memory, GiB": _number(run.described.get("peak_memory_gib", "")),
        "exchanged, MiB a step": _number(run.described.get("mib_per_step", "")),
        "samples": count if run.is_finished else f"{count}, {state_of(run)}",
    }


def _legend(entries: Sequence[Entry]) -> str:
    scorers = ", ".join(dict.fromkeys(entry.scorer for entry in entries if entry.scorer))
    told = ["Means ± their standard errors over the samples; times are of timed samples."]
    if any(entry.is_reference for entry in entries):
        told.append("Shaded: what the others with as many steps are compared with, sample by sample.")
    else:
        told.append("There is no run on one device, not compiled, to compare with.")
    if any(entry.psnr is not None for entry in entries):
        told.append("PSNR is of the samples that differ.")
    if scorers:
        told.append(f"Score: {scorers}.")
    return f'<p class="note">{escape(" ".join(told))}</p>'


def _text(mean: Mean | None, sign: str = "") -> str:
    if mean is None:
        return ""
    value, error = mean.texts(sign)
    value = value.replace("-", "−")
    return f'{value} <span class="error">± {error}</span>' if error else value


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _number(text: str) -> str:
    return f"{float(text):.4g}" if text else ""
