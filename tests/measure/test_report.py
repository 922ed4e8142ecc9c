"""Reports are complete, readable by machines, and never overwritten."""

import json

import pytest

from sparsight.measure import environment, environment_block, markdown_table, write_report

ROWS = [{"layer": "conv", "latency_ms": 1.23456}, {"layer": "block", "latency_ms": 20, "n": 3}]


def test_table():
    assert markdown_table(ROWS).splitlines() == [
        "| layer | latency_ms | n |",
        "|---|---:|---:|",
        "| conv | 1.235 |  |",
        "| block | 20 | 3 |",
    ]


def test_files_hold_rows_command_and_environment(tmp_path):
    json_path, markdown_path = write_report(
        tmp_path / "results" / "2026-01-02.block",
        ROWS,
        title="Blocks",
        command="make bench",
        notes="Backbone only.",
    )
    assert (json_path.name, markdown_path.name) == ("2026-01-02.block.json", "2026-01-02.block.md")
    content = json.loads(json_path.read_text())
    assert content["rows"] == ROWS
    assert content["command"] == "make bench"
    assert content["environment"] == environment()
    text = markdown_path.read_text()
    for part in ("# Blocks", "`make bench`", markdown_table(ROWS), "Backbone only."):
        assert part in text
    assert environment_block() in text


def test_a_result_is_never_overwritten(tmp_path):
    write_report(tmp_path / "a", ROWS, title="A", command="x")
    before = (tmp_path / "a.md").read_text()
    with pytest.raises(FileExistsError, match="never edited afterwards"):
        write_report(tmp_path / "a", ROWS[:1], title="B", command="y")
    assert (tmp_path / "a.md").read_text() == before


def test_no_rows_are_no_report(tmp_path):
    with pytest.raises(ValueError, match="write_report: 'A' has no rows"):
        write_report(tmp_path / "a", [], title="A", command="x")
    assert not list(tmp_path.iterdir())
