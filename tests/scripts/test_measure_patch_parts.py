"""Parts of `separate_gn`, one at a time."""

import re

from measure_patch_parts import ROWS, measure


def test_each_part_changes_the_pictures(capsys):
    measure("tiny-sd", samples=1, warm_up=1, steps=3, device="cpu")
    found = dict(re.findall(r"^\| (.+) \| ([\d.]+) ± [\d.]+ \|$", capsys.readouterr().out, re.MULTILINE))
    assert list(found) == list(ROWS)
    assert all(5 < float(ratio) < 60 for ratio in found.values())
    assert len(set(found.values())) == len(ROWS)
