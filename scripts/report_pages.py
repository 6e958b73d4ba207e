"""Tables for the docs: what was timed on H200s, and a report of `python -m asyncdiff_pl report` as GitHub shows it.

    python scripts/report_pages.py latencies docs/data/h200_denoising.csv docs/h200_latencies.md
    python scripts/report_pages.py report docs/report_demo/report.csv     # prints

The first writes the whole page, from rows of scripts/benchmark_denoising.py.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping
from pathlib import Path

from denoising_report import Row, header, line, newest, read_rows

from asyncdiff_pl.metrics.paired import Mean

MODELS = {
    "svd": ("Stable Video Diffusion XT", "25 frames of 1024×576"),
    "sdxl": ("SDXL", "1024²"),
    "sd21": ("Stable Diffusion 2.1", "768²"),
    "sd15": ("Stable Diffusion 1.5", "512²"),
    "sd3": ("Stable Diffusion 3 Medium", "1024²"),
    "flux": ("FLUX.1-dev", "1024²"),
    "animatediff": ("AnimateDiff", "16 frames of 512²"),
}
"""Names and sizes of models, in the page's order."""

SHOWN = {
    "layout and setting": "setting",
    "GPUs": "gpus",
    "loop, s": "loop_s",
    "× plain diffusers": "over_eager",
    "whole pipeline, s": "pipeline_s",
    "exact step, ms": "exact_step_ms",
    "asynchronous step, ms": "asynchronous_step_ms",
    "of ideal": "of_ideal",
    "not hidden, ms": "exposed_ms",
    "MiB a step": "mib_per_step",
    "peak, GiB": "peak_gib",
    "deviation": "deviation",
}

PAGE = """\
# Latencies on H200s

Every row of [data/h200_denoising.csv](data/h200_denoising.csv) as a table; of those that were timed again, the last.
`python scripts/report_pages.py latencies docs/data/h200_denoising.csv docs/h200_latencies.md` writes this page. What
was run, how, and what it means: [benchmarks.md](benchmarks.md). What layouts cost in quality: [quality.md](quality.md).

Full-size networks with random weights on {machines} (NVLink), {versions}.

- **Settings** begin with the layout: `2x1` is `cfg: 2`, `2` two stages, `2x2` `cfg: 2` with 2 stages, `p2` two patches,
  `steps2` two steps at a time, each with `warm_up` 3 where steps are asynchronous. Then come what is compiled, whether
  steps are CUDA graphs ("captured"), and by what the cut was balanced.
- **Half batch** is one half of the guidance batch: what each pair of GPUs has in a layout with `cfg: 2` on four.
- **× plain diffusers** is beside the row of plain diffusers in the same table: the fastest of all runs.
- **Of ideal** is the time of a step after warm-up, in that of one GPU in the same setting divided by the GPUs.
- **Deviation** of the final latents from one GPU's: with random weights it tells rounding from staleness, nothing of
  pictures.

![Seconds on H200s against PSNR of the embedded models](images/speed_and_quality.png)
"""

REPORT = {
    "layout": "layout",
    "ranks": "devices",
    "steps": "steps",
    "ms a step": "step_latency_ms",
    "seconds a sample": "seconds",
    "speed-up": "speed_up",
    "PSNR, dB": "psnr_db",
    "LPIPS": "lpips",
    "score": "score",
    "score beside one device's": "score_difference",
    "peak memory, GiB": "peak_memory_gib",
    "MiB a step": "mib_per_step",
    "samples": "samples",
}


def latencies(rows: list[Row]) -> str:
    """The page of what was timed.

    Args:
        rows: Rows of scripts/benchmark_denoising.py.

    Raises:
        ValueError: The page has no name for a model.
    """
    # diffusers' own code is the same in all runs, and how fast it is launched is not
    rows = newest(sorted(rows, key=lambda row: -row["loop_s"] if row["is_plain"] and row["loop_s"] else 0))
    machines = sorted({row["machine"] for row in rows})
    versions = sorted({f"torch {row['torch']}, diffusers {row['diffusers']}" for row in rows})
    parts = [PAGE.format(machines=" and ".join(machines).replace(" x ", " × "), versions="; ".join(versions))]
    known = list(MODELS)
    kinds = {(row["model"], row["steps"]) for row in rows}
    for model, steps in sorted(kinds, key=lambda kind: (known.index(_base(kind[0])), kind)):
        chosen = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
        plain = next((row["loop_s"] for row in chosen if row["is_plain"]), None)
        lines = [line(row | {"over_eager": plain and plain / row["loop_s"]}, SHOWN) for row in chosen]
        parts.append(f"## {_title(model)}, {steps} steps\n\n{header(SHOWN)}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _base(model: str) -> str:
    base = model.split()[0]
    if base not in MODELS:
        raise ValueError(f"The page knows no model {base}; add it to MODELS.")
    return base


def _title(model: str) -> str:
    """What a model is called, with the size of its pictures (as latents where they are not its own) and what else."""
    base, *more = model.split()
    name, size = MODELS[base]
    if more and re.fullmatch(r"\d+x\d+", more[0]):
        size = f"latents of {more.pop(0).replace('x', '×')}"
    return ", ".join(part for part in (name, size, " ".join(more)) if part)


def report(rows: list[dict[str, str]]) -> str:
    """A report's table as Markdown; columns that are empty throughout are left out.

    Args:
        rows: Rows of a report.csv.
    """
    shown = {title: name for title, name in REPORT.items() if any(row[name] for row in rows)}
    lines = [f"| {' | '.join(_report_cell(row, name) for name in shown.values())} |" for row in rows]
    return "\n".join([header(shown), *lines])


def _report_cell(row: Mapping[str, str], name: str) -> str:
    if not row[name] or name in ("layout", "devices", "steps", "samples"):
        return row[name]
    sign = "+" if name == "score_difference" else ""
    mean = Mean(float(row[name]), float(row.get(f"{name}_error") or "nan"))
    return " ± ".join(filter(None, mean.texts(sign)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    timed = parts.add_parser("latencies", help="write the page of what was timed on H200s")
    timed.add_argument("table", type=Path, help="CSV file with rows of scripts/benchmark_denoising.py")
    timed.add_argument("page", type=Path, help="Markdown file to write")
    told = parts.add_parser("report", help="print a report's table")
    told.add_argument("table", type=Path, help="report.csv")
    options = parser.parse_args()
    with options.table.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
        rows = [] if options.what == "latencies" else list(csv.DictReader(file, names))
    if options.what == "latencies":
        options.page.write_text(latencies(read_rows(options.table, names)), encoding="utf-8")
    else:
        print(report(rows))


if __name__ == "__main__":
    main()
