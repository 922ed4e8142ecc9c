"""The page's tables come from the JSON: goals, what is missing, and nothing outside the marks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bench_report", BENCH / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCH))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def goal(report, results, words):
    (row,) = (row for row in report.reach_rows(results) if words in row["what"])
    return row["measured"], row["met"]


def test_blocks_are_judged_by_mean_and_by_each(report):
    results = {"block": [{"realised/possible": share} for share in (0.75, 1.0, 1.3)]}
    assert goal(report, results, "geometric mean") == ("0.992", "yes")
    assert goal(report, results, "possible: each") == ("0.75 to 1.3", "no")


def test_features_are_judged_at_their_density(report):
    rows = [
        {"network": "ResNet-50 features", "asked density": 1.0, "speed-up": 0.8},
        {"network": "ResNet-50 features", "asked density": 0.3, "realised/possible": 0.95},
        {"network": "ResNet-50 features", "asked density": 0.1, "realised/possible": 0.2},
    ]
    assert goal(report, {"network": rows}, "density 1: time") == ("1.25", "no")
    assert goal(report, {"network": rows}, "density 0.3: realised") == ("0.95", "yes")


def test_memory_is_held_against_eager_of_the_same_image(report):
    rows = [
        {"variant": "eager", "image": "big", "peak MiB": 200.0, "growth KiB": 9},
        {"variant": "frozen at 1", "image": "big", "peak MiB": 150.0, "growth KiB": 0},
        {"variant": "frozen at 1", "image": "small", "peak MiB": 900.0, "growth KiB": 4},
    ]
    assert goal(report, {"memory": rows}, "peak memory") == ("0.75", "yes")
    assert goal(report, {"memory": rows}, "growth") == ("0, 4", "no")


def test_what_was_not_measured_says_so(report):
    rows = report.reach_rows({"block": [{"ours ms": "no bfloat16", "realised/possible": "-"}]})
    assert {(row["measured"], row["met"]) for row in rows} == {("not measured", "not measured")}
    assert report.table({}, "block") == "Not measured: no block.json was given."


def test_only_what_stands_between_marks_is_replaced(report):
    page = "a\n<!-- begin reach -->\nold\n<!-- end reach -->\nb\n"
    assert report.fill(page, {"reach": "| \\1 |", "block": "unused"}) == (
        "a\n<!-- begin reach -->\n| \\1 |\n<!-- end reach -->\nb\n"
    )


def test_the_page_has_a_mark_for_every_part(report, tmp_path):
    content = {"rows": [{"planes": 64, "ours ms": 1.0}], "environment": {"CPU": "x"}}
    path = tmp_path / "block.json"
    path.write_text(json.dumps({**content, "date": "today", "command": "python"}))
    page = (BENCH.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    parts = report.sections([path], None)
    assert all(f"<!-- begin {name} -->" in page for name in parts)
    assert page.count("<!-- begin ") == page.count("<!-- end ") == len(parts)
