"""Step latency and peak memory of full-size Stable Video Diffusion, layout by layout, through the package's command.

Weights are random, since latency does not depend on them. Prints a Markdown table. Example, on a machine with 4 GPUs:

    python scripts/benchmark_svd.py svd_sequential svd_n2 svd_n3 svd_n4 svd_cfg2_n2

Everything behind `--` goes to the command as it is, such as `-- --model.num_frames 14`.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

COLUMNS = ("avg_step_latency_ms", "avg_time", "peak_memory_gib", "mib_per_step")


def main() -> None:
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="names of configs, svd_n2 say")
    parser.add_argument("--images", type=int, default=3, help="samples of a layout; the first is not timed (default 3)")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the runs' logs (default: a temporary one)")
    options = parser.parse_args(arguments)
    logs = options.logs or Path(tempfile.mkdtemp())
    print("| config | ranks | step, ms | whole call, s | peak memory of a rank, GiB | boundary tensors, MiB a step |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.configs:
        command = [
            *(sys.executable, "-m", "asyncdiff_pl", "predict", "--config", f"configs/{name}.yaml"),
            *("--model.weights", "random", "--model.variant", "null"),
            *("--data.images_dir", "demo", "--data.annotations", "demo", "--data.max_images", str(options.images)),
            *("--trainer.logger.init_args.save_dir", str(logs), "--trainer.logger.init_args.version", "0"),
            *rest,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"| {name} | failed: {(result.stdout + result.stderr)[-2000:]} |", flush=True)
            continue
        with (logs / name / "version_0" / "results.csv").open() as file:
            for row in csv.DictReader(file):
                figures = " | ".join(f"{float(row[column]):.4g}" if row[column] else "" for column in COLUMNS)
                print(f"| {name}, {row['steps']} steps | {row['world_size']} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
