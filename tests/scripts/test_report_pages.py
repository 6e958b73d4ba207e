import csv
from pathlib import Path

from denoising_report import read_rows
from report_pages import latencies, report

from asyncdiff_pl.report.report_table import COLUMNS

DATA = Path(__file__).parents[2] / "docs" / "data" / "h200_denoising.csv"


def test_the_page_has_the_last_measurement_of_each_setting():
    with DATA.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
    rows = read_rows(DATA, names)
    timed = next(row for row in rows if row["model"] == "svd" and row["setting"].startswith("2x1"))
    plain = next(row for row in rows if row["model"] == "svd" and row["is_plain"])
    slower = [timed | {"loop_s": 123.456}, plain | {"loop_s": 654.321}]
    page = latencies([*rows, *slower])
    # of diffusers' own code the fastest run counts
    assert "| 2 | 123.5 |" in page
    assert "654.3" not in page
    assert f"{timed['loop_s']:.4g}" in latencies(rows)
    assert page.count("## Stable Video Diffusion XT") == 2


def test_a_report_as_markdown():
    row = dict.fromkeys(COLUMNS, "") | {"layout": "2 stages", "devices": "2", "steps": "12", "seconds": "1.96288"}
    row |= {"seconds_error": "0.031", "score_difference": "0.5", "score_difference_error": "1.2"}
    lines = report([row]).splitlines()
    assert lines[0] == "| layout | ranks | steps | seconds a sample | score beside one device's |"
    assert lines[-1] == "| 2 stages | 2 | 12 | 1.963 ± 0.031 | +0.5 ± 1.2 |"
    assert len(lines) == 3
