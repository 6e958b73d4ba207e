r"""Shows runs side by side: each sample's conditioning picture, then the frames that each run made of it.

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
from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
HEADER = 22


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
    # one palette for all frames, or still parts would shimmer
    palette = frames[0].quantize(256)
    still = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    still[0].save(output, save_all=True, append_images=still[1:], duration=milliseconds, loop=0)


def clips_of(folder: Path) -> dict[str, list[Image.Image]]:
    """The frames of each sample of a run, by the sample's id, in order of the ids."""
    steps = sorted((folder / "frames").glob("steps=*"))
    if len(steps) != 1:
        raise ValueError(f"{folder} has frames of {len(steps)} step counts; give a run of one step count.")
    samples = sorted(
        (path for path in steps[0].iterdir() if path.is_dir()), key=lambda path: (len(path.name), path.name)
    )
    return {path.name: [Image.open(file).convert("RGB") for file in sorted(path.glob("*.png"))] for path in samples}


def sheet(given: list[Image.Image], rows: dict[str, list[list[Image.Image]]], columns: int) -> Image.Image:
    """One picture: a row a sample, its conditioning picture and then `columns` frames of each run."""
    width, height = next(iter(rows.values()))[0][0].size
    lefts = [0]
    for _ in rows:
        lefts.append(lefts[-1] + (width if len(lefts) == 1 else columns * (width + 2) - 2) + 2 * MARGIN)
    total = lefts[-1] + columns * (width + 2) - 2
    page = Image.new("RGB", (total, HEADER + len(given) * (height + 2) - 2), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for left, title in zip(lefts, ("picture", *rows), strict=True):
        pen.text((left, 2), title, fill="black", font=font)
    for row, picture in enumerate(given):
        top = HEADER + row * (height + 2)
        page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (0, top))
        for left, clips in zip(lefts[1:], rows.values(), strict=True):
            clip = clips[row]
            for column in range(columns):
                at = round(column * (len(clip) - 1) / max(1, columns - 1))
                page.paste(clip[at], (left + column * (width + 2), top))
    return page


if __name__ == "__main__":
    main()
