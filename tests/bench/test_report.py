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
    return row["measured"], row["verdict"]


BOTH = {"openvino ms": 2.0, "openvino nhwc ms": 1.0}


def blocks(shares):
    return {"block": [{**BOTH, "realised/possible": share} for share in shares]}


def test_a_goal_is_not_met_against_the_slower_openvino(report):
    weak = {**BOTH, "openvino nhwc ms": "left out by --without", "realised/possible": 2.0}
    assert goal(report, {"block": [weak] * 16}, "possible: each") == ("not measured",) * 2


def test_blocks_are_judged_by_mean_and_by_each(report):
    results = blocks([0.75, 1.0, 1.3, 1.0] * 4)
    assert goal(report, results, "blocks, realised / possible: geometric mean")[1] == "met"
    assert goal(report, results, "possible: each") == ("0.75 to 1.3", "missed")
    assert goal(report, blocks([0.9] * 16), "possible: each") == ("0.9 to 0.9", "met")
    assert goal(report, blocks([0.9] * 16), "blocks, realised / possible: geo")[1] == "missed"


def test_some_of_the_rows_cannot_meet_a_goal_but_can_miss_it(report):
    assert goal(report, blocks([0.9] * 4), "possible: each")[1] == "only 4 of 16 rows measured"
    assert goal(report, blocks([0.9, 0.1]), "possible: each")[1] == "missed"
    assert goal(report, blocks([2.0]), "geometric mean (of 1 of 16 rows)") == ("2", "-")


def test_features_are_judged_at_their_density(report):
    rows = [
        {**BOTH, "network": "ResNet-50 features", "asked density": density, column: value}
        for density, column, value in (
            (1.0, "speed-up", 0.8),
            (0.3, "realised/possible", 0.95),
            (0.1, "realised/possible", 0.2),
        )
    ]
    half = [{**rows[1], "speed-up": 2.5}]
    results = {"network": rows, "network-bfloat16": half}
    assert goal(report, results, "density 1: time") == ("1.25", "missed")
    assert goal(report, results, "density 0.3: realised") == ("0.95", "met")
    assert goal(report, results, "OpenVINO bf16") == ("2.5", "met")


def test_a_sampled_part_is_held_against_torch_compile_and_nothing_weaker(report):
    rows = [
        {"network": f"{name}, sampled part", "realised/possible": 0.95, "against": "compile"}
        for name in ("fcn_resnet50", "fasterrcnn_resnet50_fpn")
    ]
    assert goal(report, {"network": rows}, "sampled part") == ("0.95, 0.95", "met")
    weak = [{**row, "against": "eager"} for row in rows]
    assert goal(report, {"network": weak}, "sampled part") == ("not measured", "not measured")
    whole = [{"network": "fcn_resnet50", "speed-up": 1.5, "against": "eager"}]
    assert goal(report, {"network": whole}, "fcn_resnet50, density 0.3, whole") == ("1.5", "-")
    assert goal(report, {"network": whole}, "whole model: times faster than eager")[0] == "1.5"


def test_memory_is_held_against_eager_of_the_same_image(report):
    def row(variant, network, peak, calls, growth, allocations):
        return {
            "variant": variant, "network": network, "size": "8x8", "peak MiB": peak,
            "calls": calls, "late growth KiB": growth, "allocations per call": allocations,
        }  # fmt: skip

    rows = [
        row("eager", "big", 200.0, 10, 9, 5),
        row("frozen at 1", "big", 150.0, 50, 0, 0.0),
        row("frozen at 0.3", "big", 220.0, 50, 0, 2.0),
        row("frozen at 0.3", "block", 300.0, 50, 70, 0.0),
        row("frozen at 0.3", "small", 900.0, 10_000, 4, 0.0),
    ]
    results = {"memory": rows}
    assert goal(report, results, "peak memory") == ("0.75, 1.1", "missed")
    assert goal(report, results, "warm call of a block") == ("0", "met")
    assert goal(report, results, "warm call of a network") == ("0 to 2", "missed")
    assert goal(report, results, "second half of 10000 calls") == ("4", "missed")
    rows[4]["late growth KiB"] = 0
    assert goal(report, results, "second half of 10000 calls") == ("0", "met")
    rows[4]["calls"] = 9_000
    assert goal(report, results, "second half of 9000 calls") == ("0", "-")
    rows[3]["allocations per call"] = "not counted: no C++ compiler found"
    assert goal(report, results, "warm call of a block") == ("not measured", "not measured")


POOLED = {"map": "8x64x112x112", "window": 2, "layout": "channels-last", "ours ms": 3.0}
FORWARD = {**POOLED, "ours / slower pool": 0.5, "formula / ours": 6.0}
TRAINED = {**POOLED, "ours / max_pool2d": 1.2, "formula / ours": 4.0}
KEPT = {"map": "8x64x112x112", "ours keeps MiB": 2.0, "formula keeps MiB": 4.0}
ERROR = {"map": "8x64x112x112", "dtype": "float16", "error ratio": 0.5, "ours, error": 1e-3}


def test_soft_pool_is_judged_by_every_row(report):
    results = {
        "pool-forward": [FORWARD] * 8,
        "pool-train": [TRAINED] * 8,
        "pool-memory": [KEPT] * 8,
        "pool-error": [ERROR] * 24,
    }
    lines = {row["what"]: (row["measured"], row["verdict"]) for row in report.reach_rows(results)}
    found = [value for what, value in lines.items() if what.startswith("SoftPool")]
    assert found == [
        ("0.5 to 0.5", "met"),
        ("6 to 6", "met"),
        ("1.2 to 1.2", "met"),
        ("0.5 to 0.5", "met"),
        ("0.5 to 0.5", "met"),
    ]
    results["pool-forward"] = [FORWARD] * 7 + [{**FORWARD, "ours / slower pool": 1.6}]
    assert goal(report, results, "slower of average") == ("0.5 to 1.6", "missed")
    results["pool-train"] = [TRAINED] * 3
    assert goal(report, results, "max pooling's")[1] == "only 3 of 8 rows measured"
    results["pool-memory"] = [{**KEPT, "ours keeps MiB": "-"}]
    assert goal(report, results, "kept for backward") == ("not measured", "not measured")


def test_training_steps_are_judged_by_time_and_by_what_is_live(report):
    row = {"network": "x", "time ratio": 1.2, "live ratio": 1.3, "peak ratio": 1.0}
    results = {"training_step": [row] * 6}
    assert goal(report, results, "dense: time") == ("1.2 to 1.2", "met")
    assert goal(report, results, "dense: memory") == ("1.3 to 1.3", "missed")


def test_rows_find_their_tables_whatever_files_they_lie_in(report, tmp_path):
    here = {"CPU": "x"}
    files = [
        write(tmp_path, "pool", [FORWARD, TRAINED], here),
        write(tmp_path, "2026-11-22-soft-pool", [KEPT, ERROR], here),
        write(tmp_path, "pool-bfloat16", [{**FORWARD, "dtype": "bfloat16", "map": "1x1"}], here),
        write(tmp_path, "training_step", [{"network": "a", "dtype": "float32"}], here),
        write(tmp_path, "training_step-bfloat16", [{"network": "b", "dtype": "bfloat16"}], here),
    ]
    parts = report.sections(files, None)
    for name, column, count in (
        ("pool-forward", "ours / slower pool", 2),
        ("pool-train", "ours / max_pool2d", 1),
        ("pool-memory", "ours keeps MiB", 1),
        ("pool-error", "ours, error", 1),
        ("training_step", "network", 2),
    ):
        header, _, *rows = parts[name].splitlines()
        assert column in header and len(rows) == count, name
    assert "avg_pool2d" not in parts["pool-forward"]  # no row has it
    absent = report.sections(files[-2:], None)
    assert absent["pool-train"] == "Not measured: there is no pool.json with such rows."
    assert absent["environment"].count("pool.json") == 1


def test_what_was_not_measured_says_so(report):
    rows = report.reach_rows({"block": [{"ours ms": "no bfloat16", "realised/possible": "-"}]})
    assert {(row["measured"], row["verdict"]) for row in rows} == {("not measured",) * 2}
    assert report.table({}, "block") == "Not measured: there is no block.json with such rows."


def write(folder, name, rows, environment):
    path = folder / f"{name}.json"
    content = {"rows": rows, "environment": environment, "date": "today", "command": "python"}
    path.write_text(json.dumps({**content, "stages": {"all": {"complete": False}}}))
    return path


def test_absent_files_are_said_and_nothing_else_happens(report, tmp_path, capsys):
    path = write(tmp_path, "block", [{"planes": 64, "ours ms": 1.0}], {"CPU": "x"})
    assert report.json_files([tmp_path]) == [path]
    assert report.json_files([path, tmp_path / "network.json"]) == [path]
    assert "network.json is not there" in capsys.readouterr().err
    parts = report.sections([path], None)
    assert "Not measured: there is no network.json" in parts["network"]
    assert "- not measured: block-bfloat16.json, network.json" in parts["environment"]
    assert "cut short: all" in parts["environment"]
    assert report.sections([], None)["environment"].endswith("Not measured yet.")


def test_different_environments_are_told_apart(report, tmp_path):
    here = {"CPU": "x", "commit": "abc"}
    files = [
        write(tmp_path, "block", [{"planes": 64}], here),
        write(tmp_path, "memory", [{"calls": 1, "variant": "eager"}], {**here, "commit": "def"}),
    ]
    text = report.sections(files, None)["environment"]
    assert "- **memory.json** has commit: def" in text
    assert "Not everything" not in report.sections(files[:1], None)["environment"]


def test_a_page_is_not_filled_from_the_quick_form(report, tmp_path, monkeypatch):
    write(tmp_path, "block", [{"planes": 64}], {"form": "quick: tiny shapes"})
    page = tmp_path / "page.md"
    page.write_text("<!-- begin reach -->\nold\n<!-- end reach -->\n")
    monkeypatch.setattr(sys, "argv", ["report", "--json", str(tmp_path), "--into", str(page)])
    with pytest.raises(SystemExit, match=r"rows are of the quick form.* without --quick"):
        report.main()
    write(tmp_path, "block", [{"planes": 64}], {"form": "full"})
    report.main()
    assert "asked" in page.read_text()


def test_only_what_stands_between_marks_is_replaced(report):
    page = "a\n<!-- begin reach -->\nold\n<!-- end reach -->\nb\n"
    assert report.fill(page, {"reach": "| \\1 |", "block": "unused"}) == (
        "a\n<!-- begin reach -->\n| \\1 |\n<!-- end reach -->\nb\n"
    )


def test_the_page_has_a_mark_for_every_part(report, tmp_path):
    path = write(tmp_path, "block", [{"planes": 64, "ours ms": 1.0}], {"CPU": "x"})
    page = (BENCH.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    parts = report.sections([path], None)
    assert all(f"<!-- begin {name} -->" in page for name in parts)
    assert page.count("<!-- begin ") == page.count("<!-- end ") == len(parts)
