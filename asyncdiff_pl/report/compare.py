"""Two runs, or two folders of pictures, side by side: a table of what they took and how alike they are, and a sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image, ImageChops

from asyncdiff_pl.callbacks.sample_table import Row, write_table
from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference
from asyncdiff_pl.report.comparison_table import COLUMNS, Line, aligned, as_row, markdown, texts_of
from asyncdiff_pl.report.picture_measures import (
    TIMES,
    Tools,
    load_tools,
    measure_pair,
    set_agreement,
    set_distance,
    steps_text,
)
from asyncdiff_pl.report.picture_sets import Key, PictureSet, bring_to_one_size, pair, read_set
from asyncdiff_pl.report.sheet import draw_sheet, scaled, some_of

DESCRIBED = (
    *("model", "weights", "scheduler", "strategy", "stages", "stride", "patches", "mode", "warm_up", "portion"),
    "parallel_steps",
    *("refresh_every", "time_shift", "cfg", "simulate", "world_size", "data_groups", "device", "dtype", "seed"),
    *("torch", "diffusers"),
)
"""Columns of results.csv that say what a run was; the table has those in which the two differ."""

MEASURED = {"peak_memory_gib": "peak memory, GiB", "mib_per_step": "exchanged, MiB a step"}
"""Columns of results.csv that the whole run has."""

SIMILAR = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
"""What is compared frame by frame."""

SIDES = {False: 256, True: 176}
"""Longest side of the sheet's pictures, in pixels, and that of the frames of videos."""

FRAMES = 3
"""Frames of a video in the sheet: its first, one of its middle and its last."""

AMPLIFIED = 4
"""By how much the sheet makes differences stronger."""


def compare(
    a: str,
    b: str,
    labels: list[str] | None = None,
    output: str = "comparison",
    annotations: str | None = None,
    lpips: str | None = None,
    frechet: str | None = None,
    precision_recall: str | None = None,
    clip: str | None = None,
    rows: int = 8,
    dump: str | None = None,
    device: str = "cpu",
) -> str:
    """Compares B with A: PSNR and SSIM sample by sample, times and scores of runs, and a sheet of both.

    Samples belong together that have the same id and, in runs, the same step count. The results are OUTPUT/compare.csv,
    compare.md, compare_samples.csv (a row a sample) and compare.png.

    Args:
        a: A run's log folder, a folder of pictures (real ones, say) or an .npz file of them (`images` [N, H, W, 3]);
            `demo` means the package's drawn scenes. Pictures that are of no run are brought to the size of the other
            side (cropped).
        b: What is compared with it, of the same kinds.
        labels: What the two are called: `[one rank, two ranks]`.
        output: Folder for the results.
        annotations: Captions file in COCO's format: it tells the ids of a folder's pictures, and captions. `demo` means
            those of the drawn scenes.
        lpips: Adds LPIPS: path of AlexNet's weights as torchvision has them (`alexnet-owt-7be5be79.pth`), or `fetch`.
        frechet: Adds the Fréchet distance of the two sets: a CLIP model (`tiny-clip`, a hub name, a folder), a
            TorchScript file (`inception-2015-12-05.pt` for FID), `inception` (FID, by torch-fidelity),
            `efficientnet-lite0` (of the extra offline-metrics), or a class.
        precision_recall: Adds improved precision and recall of B, with A's pictures as the real ones: the file
            `vgg16-397923af.pth`, or any other network that `frechet` takes.
        clip: Scores the pictures of both against their captions with this CLIP model; null takes the runs' own scores.
        rows: Samples in the sheet.
        dump: Folder to which a plain folder's pictures are written as they are compared, as ID.png in one size, for
            other tools.
        device: Where networks compute: cpu or cuda.

    Returns:
        The table, and what else there is to say.

    Raises:
        ValueError: The input is bad; the message is one sentence.
    """
    if labels is not None and len(labels) != 2:
        raise ValueError(f"labels are {labels}; give two, one for each folder.")
    if Path(output).is_file():
        raise ValueError(f"output is {output}, which is a file; give a folder.")
    if rows < 1:
        raise ValueError(f"rows is {rows}; give a number of samples from 1 up.")
    names = labels or [None, None]
    first, second = (read_set(folder, name, annotations) for folder, name in zip((a, b), names, strict=True))
    if first.label == second.label:
        first.label, second.label = f"A: {first.label}", f"B: {second.label}"
    pairs = pair(first, second)
    if not pairs and frechet is None and precision_recall is None:
        raise ValueError(
            f"{first.label} and {second.label} have no samples in common (ids such as {_some_id(first)} and "
            f"{_some_id(second)}); give runs over the same data, --annotations for pictures with other names, or "
            "--frechet or --precision_recall to compare them as sets."
        )
    resized = bring_to_one_size(first, second)
    tools = load_tools(lpips, frechet, precision_recall, clip, device)
    if resized is not None:
        tools.notes.insert(0, resized)
    if dump is not None:
        tools.notes.append(_dump((first, second), Path(dump)))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    samples: list[Row] = []
    sheet: list[tuple[Key, Key, Row]] = []
    places = list(pairs) or list(itertools.product(first.steps, second.steps))
    for n, m in places:
        found = [measure_pair(first, second, keys, tools) for keys in pairs.get((n, m), [])]
        samples += found
        lines += _lines(first, second, (n, m), found, tools)
        chosen = list(zip(pairs.get((n, m), []), found, strict=True))[: max(1, rows // len(places))]
        sheet += [(*keys, row) for keys, row in chosen]
    lines = list({(line.steps, line.quantity): line for line in lines}.values())
    write_table(folder / "compare.csv", [as_row(line) for line in lines], COLUMNS)
    table = [texts_of(line) for line in lines]
    header = ("", "", first.label, second.label, "B - A, or B against A")
    (folder / "compare.md").write_text(markdown(header, table, tools.notes), encoding="utf-8")
    if samples:
        columns = dict.fromkeys(name for row in samples for name in row)
        write_table(folder / "compare_samples.csv", samples, list(columns))
        _draw(first, second, sheet[:rows]).save(folder / "compare.png")
    return "\n".join([*aligned([header, *table]), *tools.notes, f"comparison: {folder}"])


def _lines(
    first: PictureSet, second: PictureSet, steps: tuple[int | None, int | None], rows: Sequence[Row], tools: Tools
) -> list[Line]:
    """The table's lines of one pair of step counts."""
    place = steps_text(*steps)
    results = [part.results.get(n or 0, {}) for part, n in zip((first, second), steps, strict=True)]
    counts = [sum(key[0] == n for key in part.files) for part, n in zip((first, second), steps, strict=True)]
    lines = [Line(place, "samples", str(counts[0]), str(counts[1]), f"{len(rows)} in common")]
    # beside a plain folder all of them would differ
    for column in DESCRIBED if all(results) else DESCRIBED[:1]:
        values = [result.get(column, "") for result in results]
        if values[0] != values[1]:
            lines.append(Line(place, column, *(value or "-" for value in values)))
    for column, title in TIMES.items():
        lines += _both(place, title, rows, column)
    latencies = [line for line in lines if line.quantity in TIMES.values()]
    for line in latencies[-1:]:
        if isinstance(line.first, Mean) and isinstance(line.second, Mean):
            lines.append(Line(place, "speed-up", None, f"{line.first.value / line.second.value:.3g}x"))
    for column, title in MEASURED.items():
        values = [result.get(column) for result in results]
        if any(values):
            lines.append(Line(place, title, *(f"{float(value):.4g}" if value else None for value in values)))
    lines += _scores(place, rows, tools)
    compared = [row for row in rows if row.get("psnr_db")]
    if compared:
        equal = sum(row["equal"] == "1" for row in compared)
        lines.append(Line(place, "pixel by pixel the same", None, None, f"{equal} of {len(compared)}"))
    if len(compared) < len(rows):
        tools.notes.append(
            f"{len(rows) - len(compared)} samples of {place or 'the folders'} have different numbers of frames: they "
            "are not compared frame by frame"
        )
    for column, title in SIMILAR.items():
        values = [float(row[column]) for row in compared if row.get(column)]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            lines.append(Line(place, title, None, None, _mean(finite)))
    if tools.features is not None:
        lines.append(Line(place, tools.features[0], None, None, set_distance(first, second, steps, tools)))
    if tools.neighbours is not None:
        found = set_agreement(first, second, steps, tools)
        lines += [Line(place, quantity, None, None, value) for quantity, value in found.items()]
    return lines


def _scores(place: str, rows: Sequence[Row], tools: Tools) -> list[Line]:
    scorers = {which: {row[f"scorer_{which}"] for row in rows if row[f"score_{which}"]} for which in "ab"}
    names = scorers["a"] | scorers["b"]
    if not names:
        if tools.clip is not None and rows:
            tools.notes.append("no CLIP score: the samples' captions are not known; give --annotations")
        return []
    if len(names) > 1:
        tools.notes.append(f"no difference of scores: they are of different kinds ({', '.join(sorted(names))})")
        return []
    return _both(place, names.pop(), rows, "score")


def _both(place: str, title: str, rows: Sequence[Row], column: str) -> list[Line]:
    """A column of both sides: over the pairs that have both, or each by itself where none has."""
    both = [(row[f"{column}_a"], row[f"{column}_b"]) for row in rows if row[f"{column}_a"] and row[f"{column}_b"]]
    if both:
        a, b = (
            torch.tensor([float(value) for value in values], dtype=torch.float64) for values in zip(*both, strict=True)
        )
        difference = paired_difference(b, a) if len(both) > 1 else Mean((b - a).item(), math.nan)
        return [Line(place, title, _mean(a.tolist()), _mean(b.tolist()), difference)]
    single = [[float(row[f"{column}_{which}"]) for row in rows if row[f"{column}_{which}"]] for which in "ab"]
    return [Line(place, title, *(_mean(values) if values else None for values in single))] if any(single) else []


def _draw(first: PictureSet, second: PictureSet, chosen: Iterable[tuple[Key, Key, Row]]) -> Image.Image:
    """The sheet: a row a sample, A, B and where they differ."""
    rows, texts = [], []
    for one, other, row in chosen:
        frames = [part.frames(key) for part, key in ((first, one), (second, other))]
        cells = [some_of(part, FRAMES) for part in frames]
        if row.get("psnr_db"):
            differences = (ImageChops.difference(x, y) for x, y in zip(*cells, strict=True))
            cells.append([picture.point(lambda value: min(255, AMPLIFIED * value)) for picture in differences])
        else:
            cells.append([Image.new("RGB", cells[0][0].size, "white")])
        side = SIDES[max(map(len, cells)) > 1]
        rows.append([[scaled(picture, side) for picture in part] for part in cells])
        caption = next(iter(first.captions.get(one[1]) or second.captions.get(other[1]) or ()), "")
        numbers = [
            f"{title.partition(',')[0]} {float(row[column]):.3g}"
            for column, title in SIMILAR.items()
            if row.get(column)
        ]
        if row["score_a"] and row["score_b"]:
            numbers.append(f"score {float(row['score_a']):.3g} and {float(row['score_b']):.3g}")
        if row.get("equal") == "1":
            numbers[:] = ["the same pixel by pixel", *numbers[1:]]
        place = f"{one[1]} ({row['steps']})" if row["steps"] else one[1]
        texts.append("; ".join(text for text in (place, caption.rstrip(". "), ", ".join(numbers)) if text))
    titles = (first.label, second.label, f"difference, {AMPLIFIED} times as strong")
    return draw_sheet(rows, titles, texts, gap=2, between=10, border=10)


def _dump(sets: Sequence[PictureSet], folder: Path) -> str:
    """Writes the pictures of plain folders as they are compared."""
    plain = [part for part in sets if not part.is_run]
    if len(plain) != 1:
        raise ValueError(f"dump writes the pictures of one plain folder, but there are {len(plain)}; leave it out.")
    folder.mkdir(parents=True, exist_ok=True)
    for key in plain[0].files:
        frames = plain[0].frames(key)
        name = quote(key[1], safe=" ")
        for index, frame in enumerate(frames):
            path = folder / (f"{name}.png" if len(frames) == 1 else f"{name}/{index:04}.png")
            path.parent.mkdir(exist_ok=True)
            frame.save(path)
    return f"{plain[0].label}: {len(plain[0].files)} samples are written to {folder}"


def _mean(values: Sequence[float]) -> Mean:
    return mean_with_error(torch.tensor(values)) if len(values) > 1 else Mean(values[0], math.nan)


def _some_id(part: PictureSet) -> str:
    return next(iter(part.files))[1]
