"""Curves from scored runs: means and bars over runs and seeds, for the metric of any task."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "curves.py"
MACHINE = {"CPU": "one", "threads": "2", "commit": "abc"}


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("bench_curves", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def entry(metric, score):
    return {"metrics": {"ap": score}} if metric == "ap" else {metric: score}


def write(path, scores, *, gmacs, metric="miou", is_sampled=True, ms=None, **further):
    """What `sparsight evaluate --out` writes, as far as it is read."""
    content = {
        "architecture": {"sampling": {"noise": "white"} if is_sampled else None},
        "scores": [entry(metric, score) | {"macs_total": 1e9 * gmacs} for score in scores],
    }
    if ms is not None:
        rows = {"dense, eager channels-last": 99.0, "dense, frozen": 9.0, "sampled, frozen": ms}
        rows = [{"name": name, "latency_ms": value} for name, value in rows.items()]
        content["latency"] = {"rows": rows[: 3 if is_sampled else 2]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | further))
    return path


def test_the_bars_of_one_run_are_over_its_seeds(curves, tmp_path):
    path = write(tmp_path / "a" / "e.json", [0.5, 0.6, 0.7], gmacs=2, ms=7.0, environment=MACHINE)
    (point,) = curves.read_points([f"blue noise:0.5={path}"])
    assert (point.curve, point.label, point.name) == ("blue noise", "0.5", "blue noise:0.5")
    assert point.score == curves.Spread(pytest.approx(0.6), pytest.approx(0.1), 0.5, 0.7)
    assert point.macs == curves.Spread(2e9, None, 2e9, 2e9)
    assert point.latency_ms.mean == 7.0 and point.dense_ms.mean == 9.0
    assert point.runs[0].source == "a/e.json" and point.runs[0].environment == MACHINE


def test_the_bars_of_several_runs_are_over_their_means(curves, tmp_path):
    paths = [
        write(tmp_path / str(i) / "e.json", scores, gmacs=2 + i, ms=5.0 + i)
        for i, scores in enumerate(([0.5, 0.7], [0.8, 0.8]))
    ]
    (point,) = curves.read_points([f"a={path}" for path in paths])
    std = pytest.approx(statistics.stdev([0.6, 0.8]))
    assert point.score == curves.Spread(pytest.approx(0.7), std, 0.5, 0.8)
    assert point.macs.mean == 2.5e9 and point.macs.std == pytest.approx(2**-0.5 * 1e9)
    assert point.latency_ms == curves.Spread(5.5, pytest.approx(2**-0.5), 5.0, 6.0)


def test_a_dense_run_is_timed_as_itself_and_a_result_of_training_is_read(curves, tmp_path):
    dense = write(tmp_path / "e.json", [0.6], gmacs=4, is_sampled=False, ms=1.0)
    result = {"top1": 0.9, "macs_total": 1e8, "architecture": {"sampling": None}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert curves.read_run(dense).latency_ms == 9.0
    run = curves.read_run(tmp_path / "result.json")
    assert (run.metric, run.scores, run.macs, run.latency_ms) == ("top1", [0.9], 1e8, None)


@pytest.mark.parametrize(("metric", "label"), [("miou", "mIoU"), ("top1", "top-1"), ("ap", "AP")])
def test_tables_pictures_and_points_are_written_for_the_metric_of_any_task(
    curves, tmp_path, capsys, metric, label
):
    of = {"metric": metric, "environment": MACHINE, "dataset": "some"}
    files = [
        ("dense", write(tmp_path / "d.json", [0.6], gmacs=2, is_sampled=False, ms=1.0, **of)),
        ("blue:0.5", write(tmp_path / "b5.json", [0.5, 0.52], gmacs=1, ms=3.0, **of)),
        ("blue:0.6", write(tmp_path / "b6.json", [0.55], gmacs=1.2, ms=4.0, **of)),
    ]
    out = tmp_path / "out"
    curves.main(["--out", str(out), *[f"{name}={path}" for name, path in files]])
    names = ["points.json", "score_macs.png", "score_macs.svg", "score_ms.png", "score_ms.svg"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "table.md"]
    with Image.open(out / "score_macs.png") as picture:
        assert len(np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert label in (out / "score_ms.svg").read_text()
    text = (out / "table.md").read_text()
    assert f"| {label} |" in text and "| 51.0 ± 1.4 | 50.0 to 52.0 | 1.000 | 0.500 | 3.0 |" in text
    assert "- CPU: one" in text and "different environments" not in text
    stored = json.loads((out / "points.json").read_text())
    assert (stored["metric"], stored["dataset"]) == (metric, "some")
    assert [point["name"] for point in stored["points"]] == ["dense", "blue:0.5", "blue:0.6"]
    assert stored["points"][1]["score"]["mean"] == pytest.approx(0.51)
    assert str(tmp_path) not in json.dumps(stored) + text
    assert "| blue:0.6 |" in capsys.readouterr().out


def test_the_same_points_give_the_same_bytes(curves, tmp_path):
    path = write(tmp_path / "e.json", [0.5, 0.6], gmacs=1, ms=3.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert curves.draw(curves.read_points([f"x={path}"]), "macs", tmp_path / name / "p")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / name / f"p.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second


def test_small_counts_have_a_small_unit_and_missing_milliseconds_are_said(curves, tmp_path, capsys):
    path = write(tmp_path / "e.json", [0.5], gmacs=0.125)
    curves.main(["--out", str(tmp_path / "out"), f"cifar={path}"])
    assert "MMACs" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "score_ms.png").exists()
    assert "no milliseconds" in capsys.readouterr().out


def test_milliseconds_of_different_machines_are_marked(curves, tmp_path):
    paths = [
        write(tmp_path / f"{cpu}.json", [0.5], gmacs=1, ms=3.0, environment=MACHINE | {"CPU": cpu})
        for cpu in ("one", "two")
    ]
    points = curves.read_points([f"{path.stem}={path}" for path in paths])
    assert "**Milliseconds of different environments** (CPU)" in curves.notes(points)
    assert "different environments" not in curves.notes(points[:1])


def test_what_cannot_be_compared_is_refused(curves, tmp_path):
    one = write(tmp_path / "one.json", [0.5], gmacs=1, dataset="camvid")
    other = write(tmp_path / "two.json", [0.5], gmacs=1, dataset="cityscapes")
    with pytest.raises(ValueError, match=r"more than one dataset: camvid in .*, cityscapes in"):
        curves.read_points([f"a={one}", f"b={other}"])
    ap = write(tmp_path / "ap.json", [0.5], gmacs=1, metric="ap")
    with pytest.raises(ValueError, match=r"more than one metric: miou in .*, ap in"):
        curves.read_points([f"a={one}", f"b={ap}"])


def test_arguments_and_files_that_are_none_are_named(curves, tmp_path):
    for argument in ("runs/a.json", "=a.json", "a="):
        with pytest.raises(ValueError, match=r"curves: '.*'; name=file is required"):
            curves.read_points([argument])
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist; a file that"):
        curves.read_points([f"a={tmp_path / 'gone.json'}"])
    path = tmp_path / "e.json"
    empty = write(tmp_path / "empty.json", [], gmacs=1)
    no_ap = write(tmp_path / "no_ap.json", [0.5, None], gmacs=1, metric="ap")
    path.write_text("[]")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for wrong in (path, empty, no_ap, broken):
        with pytest.raises(ValueError, match=rf"{wrong.name} is no scored run .*are required"):
            curves.read_points([f"a={wrong}"])
