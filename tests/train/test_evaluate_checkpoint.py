"""A checkpoint on its data set: what is scored, how far seeds spread, what takes how long."""

import json
import statistics
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from sparsight.convert import freeze
from sparsight.measure.latency import Latency, LatencyComparison
from sparsight.nn import set_seed
from sparsight.train.architecture import build_dense
from sparsight.train.checkpoint import load_checkpoint, read_architecture, save_checkpoint
from sparsight.train.dense_inference import DenseInference
from sparsight.train.evaluate_checkpoint import describe, evaluate_checkpoint, latency_rows
from sparsight.train.evaluation_data import open_evaluation_data

METRICS = {"camvid": "miou", "cifar10": "top1", "coco": "ap"}


@pytest.mark.parametrize("name", METRICS)
def test_seeds_give_mean_deviation_least_and_greatest_for_each_task(name, checkpoint_of, capsys):
    weights, root = checkpoint_of(name)
    result = evaluate_checkpoint(weights, data=root, seeds=2, latency=False)
    assert (result["dataset"], result["metric"]) == (name, METRICS[name])
    assert result["seeds"] == [0, 1] and result["frozen"] and result["split"] == "val"
    shares = [score["share"] for score in result["scores"]]
    assert len(set(shares)) == 2
    assert result["summary"]["share"] == {
        "mean": pytest.approx(sum(shares) / 2),
        "std": pytest.approx(statistics.stdev(shares)),
        "min": min(shares),
        "max": max(shares),
    }
    macs = [score["macs_total"] for score in result["scores"]]
    assert result["summary"]["macs_total"]["mean"] == pytest.approx(sum(macs) / 2)
    metric = result["summary"][METRICS[name]]
    assert 0 <= metric["min"] <= metric["mean"] <= metric["max"] <= 1
    assert len(result.get("published_gmacs", [])) == (2 if name == "coco" else 0)
    stored = json.loads(json.dumps(result))
    assert stored["summary"] == result["summary"] and stored["size"] == result["size"]
    assert f"{describe(result)}\n" in capsys.readouterr().out
    assert describe(result).endswith("; 2 sampling seeds")


def test_each_seed_scores_as_the_model_frozen_with_it(checkpoint_of):
    weights, root = checkpoint_of("cifar10")
    result = evaluate_checkpoint(weights, data=root, seeds=2, latency=False, batch_size=2)
    model, architecture = load_checkpoint(weights)
    images = open_evaluation_data("cifar10", root, split="val", num_classes=10, size=(32, 32))
    for seed, found in enumerate(result["scores"]):
        set_seed(model, seed)
        frozen = freeze(model.eval(), example=images.example())
        expected = images.score(frozen, batch_size=2)
        assert found["macs_total"] == expected.macs_total
        assert found["top1"] == expected.top1
        assert found["density"] == expected.density
    assert result["architecture"] == architecture.to_json()


def test_a_dense_model_is_scored_once(checkpoint_of, tmp_path, capsys):
    weights, root = checkpoint_of("cifar10")
    dense = replace(read_architecture(weights), sampling=None)
    save_checkpoint(tmp_path / "dense.safetensors", build_dense(dense), dense)
    result = evaluate_checkpoint(tmp_path / "dense.safetensors", data=root, seeds=4)
    assert result["seeds"] == [0]
    assert result["summary"]["share"] == {"mean": 1.0, "std": None, "min": 1.0, "max": 1.0}
    assert [row["name"] for row in result["latency"]["rows"]] == [
        "dense, eager channels-last",
        "dense, frozen",
    ]
    printed = capsys.readouterr().out
    assert "seeds 1 to 3: left out" in printed and "±" not in printed


def test_a_smaller_input_costs_less(checkpoint_of):
    weights, root = checkpoint_of("camvid")
    options = {"data": root, "latency": False, "frozen": False}
    full = evaluate_checkpoint(weights, size=(32, 64), **options)
    small = evaluate_checkpoint(weights, size=(32, 32), **options)
    assert small["size"] == [32, 32] and small["architecture"] == full["architecture"]
    assert small["scores"][0]["macs_dense"] == full["scores"][0]["macs_dense"] / 2
    assert not small["frozen"]


def test_milliseconds_are_taken_beside_the_dense_form(checkpoint_of):
    model, architecture = load_checkpoint(checkpoint_of("cifar10")[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = latency_rows(model.eval(), architecture, torch.zeros(1, 3, 32, 32))
    names = ["dense, eager channels-last", "dense, frozen", "sampled, frozen"]
    assert [row.name for row in rows.rows] == names
    assert all(row.latency_ms > 0 for row in rows.rows)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_scales_mirror_images_and_windows_are_scored_and_counted(checkpoint_of, monkeypatch):
    timed = {}

    def measure(candidates):
        timed.update({name: call() for name, call in candidates.items()})
        rows = [Latency(name, 1.0, 0.0, 1.0, 1, 1.0) for name in candidates]
        return LatencyComparison(rows, 1, "cpu")

    room = import_module("sparsight.train.evaluate_checkpoint")
    monkeypatch.setattr(room, "measure_latency", measure)
    weights, root = checkpoint_of("camvid")
    plain = evaluate_checkpoint(weights, data=root, latency=False)
    both = DenseInference(scales=(1.0, 0.5), flip=True, window=(32, 32), overlap=8)
    found = evaluate_checkpoint(weights, data=root, inference=both)
    assert found["inference"] == {
        "scales": (1.0, 0.5),
        "flip": True,
        "window": (32, 32),
        "overlap": 8,
    }
    # 32x48 is two windows of 32x32, its half is a picture of 16x24; each of them twice.
    windows, half = 2 * 32 * 32, 16 * 24
    ratio = 2 * (windows + half) / (32 * 48)
    dense = [result["scores"][0]["macs_dense"] for result in (found, plain)]
    assert dense[0] / dense[1] == pytest.approx(ratio, rel=0.05)
    density = found["scores"][0]["density"]
    assert density.keys() == plain["scores"][0]["density"].keys()
    assert all(0 <= value <= 1 for value in density.values())
    assert found["scores"][0]["class_density"] == {} != plain["scores"][0]["class_density"]
    assert len(timed) == 3
    for out in timed.values():  # probabilities, where the model alone returns logits
        torch.testing.assert_close(out["out"].exp().sum(1), torch.ones(1, 32, 48))


def test_what_is_no_segmentation_has_no_scales(checkpoint_of):
    weights, root = checkpoint_of("cifar10")
    with pytest.raises(ValueError, match=r"evaluate_checkpoint: .* for classification; scales"):
        evaluate_checkpoint(weights, data=root, inference=DenseInference(flip=True))


def test_no_seed_is_refused(checkpoint_of):
    weights, root = checkpoint_of("cifar10")
    with pytest.raises(ValueError, match=r"evaluate_checkpoint: seeds=0; at least 1 is required"):
        evaluate_checkpoint(weights, data=root, seeds=0)
    with pytest.raises(ValueError, match=r"evaluate_checkpoint: batch_size=0; at least 1"):
        evaluate_checkpoint(weights, data=root, batch_size=0)
