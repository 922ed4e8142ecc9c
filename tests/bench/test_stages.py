"""Rows are on disk as soon as they are measured, and one file never mixes environments."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
HERE = {"CPU": "x", "commit": "abc"}


@pytest.fixture(scope="module")
def stages():
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("harness.stages")
    finally:
        sys.path.remove(str(BENCH))


def open_file(stages, stem, described=None, order=("first", "second")):
    return stages.StageFile(
        stem, title="Title", notes="Notes.", described=described or HERE, order=order
    )


def written(stem):
    return json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))


def test_every_row_is_on_disk_before_the_next_is_measured(stages, tmp_path):
    stem = tmp_path / "new" / "block"
    seen = []

    def measure():
        yield {"n": 1}
        seen.append(written(stem))
        yield {"n": 2}

    file = open_file(stages, stem)
    assert stages.run_stages(file, [stages.Stage("first", measure)], command="run") == []
    assert [row["n"] for row in seen[0]["rows"]] == [1]
    assert seen[0]["stages"]["first"]["complete"] is False
    content = written(stem)
    assert [row["n"] for row in content["rows"]] == [1, 2]
    assert content["stages"]["first"]["complete"] is True
    assert content["environment"] == HERE and content["command"] == "run"
    assert not list(stem.parent.glob(".*")), "the file written beside is renamed"


def test_a_run_that_is_cut_keeps_its_rows_and_goes_on_from_there(stages, tmp_path):
    stem, calls = tmp_path / "block", []

    def first():
        calls.append("first")
        return [{"n": 1}]

    def second():
        calls.append("second")
        yield {"n": 2}
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield {"n": 3}

    both = [stages.Stage("first", first), stages.Stage("second", second)]
    with pytest.raises(KeyboardInterrupt):
        stages.run_stages(open_file(stages, stem), both, command="run")
    assert [row["n"] for row in written(stem)["rows"]] == [1, 2]
    assert "**Cut short:** second." in stem.with_suffix(".md").read_text(encoding="utf-8")
    stages.run_stages(open_file(stages, stem), both, command="run", resume=True)
    assert calls == ["first", "second", "second"]
    assert [row["n"] for row in written(stem)["rows"]] == [1, 2, 3]


def test_a_stage_measured_again_replaces_its_rows_and_keeps_the_others(stages, tmp_path):
    stem = tmp_path / "block"

    def run(number, **options):
        both = [
            stages.Stage("first", lambda: [{"n": number}]),
            stages.Stage("second", lambda: [{"n": -number}]),
        ]
        stages.run_stages(open_file(stages, stem), both, command=f"run {number}", **options)

    run(1)
    run(2, only=["first"])
    content = written(stem)
    assert [(row["stage"], row["n"]) for row in content["rows"]] == [("first", 2), ("second", -1)]
    assert content["command"] == "run 2; run 1"
    assert content["stages"]["second"]["command"] == "run 1"


def test_a_stage_that_fails_before_its_first_row_keeps_the_old_ones(stages, tmp_path, capsys):
    stem = tmp_path / "block"

    def fail():
        raise RuntimeError("a rival broke")

    good = [stages.Stage("first", lambda: [{"n": 1}]), stages.Stage("second", lambda: [{"n": 2}])]
    stages.run_stages(open_file(stages, stem), good, command="run")
    bad = [stages.Stage("first", fail), stages.Stage("second", lambda: [{"n": 3}])]
    assert stages.run_stages(open_file(stages, stem), bad, command="run") == ["first"]
    assert "a rival broke" in capsys.readouterr().err
    assert [row["n"] for row in written(stem)["rows"]] == [1, 3]


def test_rows_of_another_environment_are_refused(stages, tmp_path):
    stem = tmp_path / "block"
    stages.run_stages(
        open_file(stages, stem), [stages.Stage("first", lambda: [{"n": 1}])], command="run"
    )
    before = stem.with_suffix(".json").read_bytes()
    for other in ({**HERE, "commit": "def"}, {"CPU": "x"}, {**HERE, "form": "quick"}):
        with pytest.raises(ValueError, match=r"block.json holds rows of another .* with --out"):
            open_file(stages, stem, other)
    assert stem.with_suffix(".json").read_bytes() == before


def test_a_file_without_stages_is_refused(stages, tmp_path):
    (tmp_path / "block.json").write_text(json.dumps({"rows": [], "environment": HERE}))
    with pytest.raises(ValueError, match=r"block.json holds no stages.* new folder with --out"):
        open_file(stages, tmp_path / "block")


def test_stages_keep_the_scripts_order_whichever_was_measured_first(stages, tmp_path):
    stem = tmp_path / "block"
    both = [stages.Stage(name, lambda name=name: [{"n": name}]) for name in ("first", "second")]
    for only in (["second"], ["first"]):
        stages.run_stages(open_file(stages, stem), both, command="run", only=only)
    assert [row["n"] for row in written(stem)["rows"]] == ["first", "second"]
    with pytest.raises(ValueError, match=r"there is no stage third; this script has first, second"):
        stages.run_stages(open_file(stages, stem), both, command="run", only=["third"])


def test_stages_with_columns_of_their_own_have_a_table_each(stages, tmp_path):
    stem = tmp_path / "pool"
    file = open_file(stages, stem, order=("first", "second", "third"))
    rows = {"first": [{"n": 1, "ms": 2}], "second": [{"n": 3}], "third": [{"n": 4, "MiB": 5}]}
    stages.run_stages(
        file,
        [stages.Stage(name, lambda name=name: rows[name]) for name in rows],
        command="run",
    )
    text = stem.with_suffix(".md").read_text(encoding="utf-8")
    assert "## first, second\n\n| n | ms |" in text
    assert "## third\n\n| n | MiB |" in text
    assert text.index("| 3 |") < text.index("## third")


def test_one_table_has_no_heading_of_its_own(stages, tmp_path):
    stem = tmp_path / "block"
    stages.run_stages(
        open_file(stages, stem), [stages.Stage("first", lambda: [{"n": 1}])], command="run"
    )
    assert "## first" not in stem.with_suffix(".md").read_text(encoding="utf-8")
