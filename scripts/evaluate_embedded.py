"""Measures the embedded models on held-out scenes, each figure against the bound that it should keep.

Prints a table and writes it as evaluation.md and evaluation.json, with strips, sheets and an animation beside it; the
exit status is 1 if a bound is missed:

    python scripts/evaluate_embedded.py --device cuda --parts clip autoencoders svd sd dit --output evaluation

On a CPU, to see whether it works at all: `--limit 2 --steps 2 --few_steps 1`.
"""

from __future__ import annotations

import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

import torch
from embedded_measures import measure_autoencoders, measure_clip, measure_dit, measure_sd, measure_svd
from embedded_report import Line, Options, markdown, report
from jsonargparse import ArgumentParser

PARTS = {
    "clip": measure_clip,
    "autoencoders": measure_autoencoders,
    "svd": measure_svd,
    "sd": measure_sd,
    "dit": measure_dit,
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_class_arguments(Options)
    arguments = vars(parser.parse_args())
    parts = arguments.pop("parts")
    try:
        lines = evaluate(Options(**arguments), parts)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(any(line.result == "MISS" for line in lines))


def evaluate(options: Options, parts: Sequence[str]) -> list[Line]:
    """Measures the parts, one after the other, and writes the report anew after each."""
    torch.backends.cudnn.deterministic = True
    options.output.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for part in parts:
        started = time.perf_counter()
        found = PARTS[part](options)
        lines += found
        print(f"{markdown(found)}\n{part}: {time.perf_counter() - started:.0f} s\n", flush=True)
        (options.output / "evaluation.md").write_text(markdown(lines), encoding="utf-8")
        (options.output / "evaluation.json").write_text(report(options, lines), encoding="utf-8")
    return lines


if __name__ == "__main__":
    main()
