r"""Shows any number of runs side by side: each sample's conditioning picture, then the frames that each run made of it.

For two runs, with numbers, there is `python -m asyncdiff_pl compare A B`; this draws the pictures of README and docs.

    python scripts/compare_runs.py --pictures asyncdiff_pl/assets/demo_coco --output docs/images/demo.gif \
        --runs '{"one rank": "lightning_logs/demo_one_rank/version_0", "two ranks": "lightning_logs/demo/version_0"}'

A .gif moves; a .png shows some frames of each run in a row.
"""

from __future__ import annotations

import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import ArgumentParser
from PIL import Image

from asyncdiff_pl.callbacks.frame_files import encode_gif
from asyncdiff_pl.callbacks.written_frames import read_frames, samples_of, step_counts
from asyncdiff_pl.report.sheet import draw_sheet, some_of


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_function_arguments(compare)
    try:
        compare(**vars(parser.parse_args()))
    except ValueError as error:
        sys.exit(f"error: {error}")


def compare(
    runs: dict[str, Path], pictures: Path, output: Path, samples: int = 4, columns: int = 3, milliseconds: int = 143
) -> None:
    """Draws the comparison.

    Args:
        runs: Log folders of runs of one step count, by the name that stands above each.
        pictures: Folder in COCO's format that the runs were conditioned on.
        output: A .gif or a .png.
        samples: Samples to show, one below the other.
        columns: In a .png, frames of each run, from its first to its last.
        milliseconds: In a .gif, how long a frame is shown.

    Raises:
        ValueError: A run has no frames, or the ending is another.
    """
    if output.suffix not in (".gif", ".png"):
        raise ValueError(f"output is {output}; it should end in .gif or .png.")
    found = {name: clips_of(folder) for name, folder in runs.items()}
    ids = list(next(iter(found.values())))[:samples]
    names = {
        str(image["id"]): image["file_name"] for image in json.loads((pictures / "captions.json").read_text())["images"]
    }
    given = [Image.open(pictures / "images" / names[name]).convert("RGB") for name in ids]
    rows = {name: [clips[sample] for sample in ids] for name, clips in found.items()}
    if output.suffix == ".png":
        sheet(given, rows, columns).save(output)
        return
    length = min(len(clip) for clips in rows.values() for clip in clips)
    frames = [
        sheet(given, {name: [[clip[at]] for clip in clips] for name, clips in rows.items()}, 1) for at in range(length)
    ]
    output.write_bytes(encode_gif(frames, fps=round(1000 / milliseconds)))


def clips_of(folder: Path) -> dict[str, list[Image.Image]]:
    """The frames of each sample of a run, by the sample's id, in order of the ids."""
    steps = step_counts(folder)
    if len(steps) != 1:
        raise ValueError(f"{folder} has frames of {len(steps)} step counts; give a run of one step count.")
    return {name: read_frames(files) for name, files in samples_of(folder, steps[0]).items()}


def sheet(given: list[Image.Image], rows: dict[str, list[list[Image.Image]]], columns: int) -> Image.Image:
    """One picture: a row a sample, its conditioning picture and then `columns` frames of each run."""
    size = next(iter(rows.values()))[0][0].size
    cells = [
        [[picture.resize(size, Image.Resampling.LANCZOS)], *(some_of(clips[row], columns) for clips in rows.values())]
        for row, picture in enumerate(given)
    ]
    return draw_sheet(cells, ("picture", *rows), between=10)


if __name__ == "__main__":
    main()
