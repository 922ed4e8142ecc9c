"""Curves from runs: what was evaluated counts, what was not measured is left empty."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "curves.py"


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("bench_curves", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder, *, miou, gmacs, sampling=None, method="sampled", seeds=(), ms=None):
    folder.mkdir()
    architecture = {"sampling": sampling}
    result = {"miou": miou, "macs_total": 1e9 * gmacs, "method": method}
    (folder / "result.json").write_text(json.dumps(result | {"architecture": architecture}))
    if seeds:
        mean = sum(seeds) / len(seeds)
        evaluation = {
            "architecture": architecture,
            "miou_mean": mean,
            "miou_std": 0.01,
            "scores": [{"miou": s, "macs_total": 2e9 * gmacs} for s in seeds],
        }
        if ms is not None:
            rows = [("dense, eager channels-last", 99.0), ("sampled, frozen", ms)]
            rows = [{"name": name, "latency_ms": value} for name, value in rows]
            evaluation["latency"] = {"rows": rows}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_an_evaluation_counts_before_the_result_of_training(curves, tmp_path):
    sampling = {"noise": "blue", "sampler": "gumbel"}
    folder = write(tmp_path / "a", miou=0.1, gmacs=1.0, sampling=sampling, seeds=(0.5, 0.6), ms=7.0)
    run = curves.read_run(folder)
    assert run == curves.Run("a", "sampled, blue noise", 0.55, 0.01, 2, 2.0, 7.0)
    plain = curves.read_run(write(tmp_path / "b", miou=0.4, gmacs=3.0))
    assert (plain.curve, plain.score, plain.gmacs) == ("dense", 0.4, 3.0)
    assert math.isnan(plain.latency_ms) and math.isnan(plain.spread)


def test_baselines_are_curves_of_their_own(curves, tmp_path):
    resized = write(tmp_path / "r", miou=0.4, gmacs=1.0, method="resized")
    gated = {"noise": "white", "sampler": "relu_gate"}
    old = {"noise": "white"}  # from before there were other samplers
    assert curves.read_run(resized).curve == "resized"
    assert curves.read_run(write(tmp_path / "g", miou=0, gmacs=1, sampling=gated)).curve == (
        "relu gate"
    )
    assert curves.read_run(write(tmp_path / "o", miou=0, gmacs=1, sampling=old)).curve == (
        "sampled, white noise"
    )


def test_table_and_pictures_are_written(curves, tmp_path, capsys):
    dense = write(tmp_path / "dense", miou=0.6, gmacs=2.0)
    sampling = {"noise": "white"}
    sampled = write(
        tmp_path / "sampled", miou=0.5, gmacs=0.5, sampling=sampling, seeds=(0.5,), ms=3.0
    )
    out = tmp_path / "out"
    curves.main(["--runs", str(dense), str(sampled), "--out", str(out)])
    text = (out / "table.md").read_text()
    assert "| dense | dense | 60.0 |" in text and "50.0 ± 1.0" in text and "0.500" in text
    assert (out / "score_macs.png").stat().st_size and (out / "score_ms.png").stat().st_size
    curves.main(["--runs", str(dense), "--out", str(tmp_path / "dense_only")])
    assert not (tmp_path / "dense_only" / "score_ms.png").exists()
    assert "no milliseconds" in capsys.readouterr().out


def test_a_folder_without_results_is_named(curves, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither result\.json nor evaluation\.json"):
        curves.read_run(tmp_path)
