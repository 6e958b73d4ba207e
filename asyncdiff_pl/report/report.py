"""One answer to what to run: a page, a table and plots of many runs, from their log folders alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.callbacks.sample_table import Row, read_table, write_table
from asyncdiff_pl.report.advice import advise
from asyncdiff_pl.report.embedded_pictures import data_uri, show_samples
from asyncdiff_pl.report.layout_labels import label_runs
from asyncdiff_pl.report.page import Section, render
from asyncdiff_pl.report.picture_measures import Tools, load_tools
from asyncdiff_pl.report.plots import check_matplotlib, draw_plots
from asyncdiff_pl.report.report_table import COLUMNS, Entry, as_row, entries_of
from asyncdiff_pl.report.reproduction import command_of, environment, settings_text
from asyncdiff_pl.report.run_folders import CELLS, Run, expand, groups_of, read_runs

LIMIT = 20 * 10**6
"""Most bytes of report.html."""

PICTURES = 14 * 10**6
"""Most bytes of its pictures; plots and text have the rest."""

DPI = 120


def report(
    runs: list[str],
    output: str = "report",
    samples: int = 4,
    lpips: str | None = None,
    device: str = "cpu",
    title: str = "What to run",
) -> str:
    """Reports on runs side by side: what each layout takes and gives against one device, and what to run.

    Writes OUTPUT/report.html, one file that needs neither a network nor other files, report.csv, and the plots as PNG
    files. Runs that did the same work (model, data, settings) are compared with the one of them on one device, not
    compiled, that has as many steps; what is not measured is not told. Runs that were stopped are reported as far as
    they came.

    Args:
        runs: Log folders of `predict`, folders that hold such, or a sweep's folder.
        output: Folder for the results.
        samples: Samples whose pictures are shown side by side; 0 shows none.
        lpips: Adds LPIPS: path of AlexNet's weights as torchvision has them (`alexnet-owt-7be5be79.pth`), or `fetch`.
        device: Where LPIPS computes: cpu or cuda.
        title: Title of the page.

    Returns:
        The recommendations, and where the report is.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    if samples < 0:
        raise ValueError(f"samples is {samples}; give a number from 0 up.")
    if Path(output).is_file():
        raise ValueError(f"output is {output}, which is a file; give a folder.")
    check_matplotlib()
    found = [run for folder in expand(runs) for run in read_runs(folder)]
    failures = _failures(runs)
    if not found:
        raise ValueError("The runs have no finished samples yet, so that there is nothing to report; let them go on.")
    tools = load_tools(lpips, None, None, None, device)
    groups = groups_of(found)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    rows: list[Row] = []
    for number, (group, name) in enumerate(zip(groups, _titles(groups), strict=True), 1):
        label_runs(group)
        entries = entries_of(group, tools)
        rows += [as_row(name, entry, entries) for entry in entries]
        prefix = f"{number}_" if len(groups) > 1 else ""
        sections.append(_section(name, entries, tools, folder, prefix, samples, PICTURES // len(groups)))
    write_table(folder / "report.csv", rows, COLUMNS)
    page = render(title, sections, failures).encode()
    assert len(page) <= LIMIT
    write_atomically(folder / "report.html", page)
    told = [
        f"{section.title}: {sentence}" if len(sections) > 1 else sentence
        for section in sections
        for sentence in section.advice
    ]
    return "\n".join([*told, *failures, f"report: {folder / 'report.html'}"])


def _section(
    name: str, entries: Sequence[Entry], tools: Tools, folder: Path, prefix: str, samples: int, limit: int
) -> Section:
    plots = {}
    for plot, figure in draw_plots(entries).items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        write_atomically(folder / f"{prefix}{plot}.png", file.getvalue())
        plots[plot] = data_uri(file.getvalue(), "image/png")
    runs = [entry.run for entry in entries]
    base = next((entry.run for entry in entries if entry.is_reference), runs[0])
    several = len({run.steps for run in runs}) > 1
    commands = [
        (f"{run.label}, {run.steps} steps" if several else run.label, command_of(run, base))
        for run in runs
        if run.config and base.config
    ]
    return Section(
        name,
        entries,
        advise(entries),
        plots,
        show_samples(entries, samples, limit),
        environment(runs),
        settings_text(base),
        commands,
        tuple(tools.notes),
    )


def _titles(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What each group computed: its model, and what tells it from groups of the same model."""
    titles = []
    for group in groups:
        first = group[0].described
        title = ", ".join(first[name] for name in ("model", "dtype", "device") if first.get(name))
        if first.get("weights") == "random":
            title += ", random weights"
        same = [other for other in groups if other[0].described.get("model") == first.get("model")]
        own, others = set(group[0].work), [set(other[0].work) for other in same if other is not group]
        differing = sorted(own - set.intersection(*others)) if others else []
        if differing:
            title += f" ({'; '.join(text.partition('.')[2] or text for text in differing[:4])})"
        titles.append(title)
    return titles


def _failures(folders: Sequence[str]) -> list[str]:
    """What a sweep's table says of cells that did not come to their end."""
    told = []
    for folder in folders:
        for row in read_table(Path(folder).expanduser() / CELLS):
            if row["state"] != "finished":
                reason = f": {row['message']}" if row["message"] else ""
                told.append(f"{row['cell']}: {row['state']}{reason}")
    return told
