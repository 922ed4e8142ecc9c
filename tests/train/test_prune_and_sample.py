"""The recipe that prunes, samples and distils: its steps, their table, going on after a stop."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsight.cli import load_recipe
from sparsight.measure import count_macs
from sparsight.models import resnet_cifar
from sparsight.nn import SampledBlock
from sparsight.train import distillation
from sparsight.train.checkpoint import load_checkpoint, read_architecture
from sparsight.train.evaluate_checkpoint import evaluate_checkpoint
from sparsight.train.prune_and_sample import ChainSettings
from sparsight.train.recipe import StepSeed

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CIFAR10 = load_recipe(RECIPES / "classification" / "prune_and_sample_cifar10.py")
CAMVID = load_recipe(RECIPES / "segmentation" / "prune_and_sample_camvid.py")
QUICK = {"quick": True, "progress_bar": False}
STEPS = ["dense", "pruned", "sampled, untrained", "sampled, distilled"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet8.pt"
    torch.manual_seed(0)
    torch.save(resnet_cifar(8).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, weights) -> tuple[Path, dict]:
    """One run on drawn stripes, from weights that are not random to the recipe."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("chain")
    return out, CIFAR10(**QUICK, depth=8, init=weights, budget=0.6, out=str(out))


def test_every_step_is_a_checkpoint_that_costs_what_the_table_says(chain):
    out, result = chain
    assert [step["name"] for step in result["steps"]] == STEPS
    image = torch.zeros(1, 3, 32, 32)
    for step in result["steps"]:
        model, architecture = load_checkpoint(out / step["checkpoint"])
        if architecture.sampling is None:  # what a sampled one costs depends on the image
            assert count_macs(model.eval(), image).total == step["macs_total"]
        assert step["metric"] == "top1" and 0 <= step["score"] <= 1
        assert step["latency_ms"] > 0
    dense, pruned, untrained, _ = (step["macs_total"] for step in result["steps"])
    assert 1.9 < dense / pruned < 2.2
    assert untrained / pruned == pytest.approx(0.6, abs=0.05)
    assert result["steps"][0]["time_ratio"] == 1


def test_the_budget_is_of_the_pruned_network_and_the_total_is_told(chain):
    out, result = chain
    share_of_pruned = result["training"]["settled_share"]
    assert share_of_pruned == pytest.approx(0.6, abs=0.01)
    dense, pruned, _, last = (step["macs_total"] for step in result["steps"])
    assert result["share_of_pruned"] == pytest.approx(last / pruned)
    assert result["share_of_dense"] == result["steps"][-1]["share"] == pytest.approx(last / dense)
    assert result["details"]["pruned"]["macs_before"] > result["details"]["pruned"]["macs_after"]
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))


def test_the_end_is_narrow_and_sampled_and_is_evaluated_as_any_other(chain, checkpoint_of):
    out, _ = chain
    model, architecture = load_checkpoint(out / "weights.safetensors")
    assert architecture.widths == read_architecture(out / "pruned.safetensors").widths
    assert architecture.widths is not None and architecture.sampling is not None
    assert sum(isinstance(module, SampledBlock) for module in model.modules()) == 3
    _, images = checkpoint_of("cifar10")
    scored = evaluate_checkpoint(out / "weights.safetensors", data=images, dataset="cifar10")
    assert scored["latency"]["rows"][-1]["name"] == "sampled, frozen"


def test_it_starts_from_the_weights_it_was_given(chain, weights):
    out, _ = chain
    expected = torch.load(weights, weights_only=True)
    dense = load_file(out / "dense.safetensors")
    assert all(torch.equal(dense[name], value) for name, value in expected.items())


def test_a_stopped_run_goes_on_to_the_same_bits(chain, weights, tmp_path, monkeypatch):
    out, result = chain
    flags = {**QUICK, "depth": 8, "init": weights, "budget": 0.6, "out": str(tmp_path)}
    seed = StepSeed.on_train_batch_start

    def stopped(self, trainer, *rest):
        seed(self, trainer, *rest)
        if trainer.global_step == 3:
            raise ConnectionAbortedError

    with monkeypatch.context() as patch:
        patch.setattr(StepSeed, "on_train_batch_start", stopped)
        with pytest.raises(ConnectionAbortedError):
            CIFAR10(**flags, latency=False)
    assert not (tmp_path / "weights.safetensors").exists()
    pruned = (tmp_path / "pruned.safetensors").stat().st_mtime_ns
    again = CIFAR10(**flags, latency=False, resume=True)
    assert (tmp_path / "pruned.safetensors").stat().st_mtime_ns == pruned  # not made again
    whole, resumed = (load_file(folder / "weights.safetensors") for folder in (out, tmp_path))
    assert set(whole) == set(resumed)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert again["latency"] is None and again["steps"][1]["latency_ms"] is None
    assert again["details"] == json.loads(json.dumps(result["details"]))
    with pytest.raises(ValueError, match=r"were made with settings .*'speedup': 2\.0.*resume"):
        CIFAR10(**flags, speedup=1.5, resume=True)


def test_a_tuned_and_calibrated_chain_has_rows_for_both(tmp_path, capsys, monkeypatch):
    teachers = []
    load = distillation.load_teacher
    monkeypatch.setattr(
        distillation,
        "load_teacher",
        lambda path, **like: teachers.append(path) or load(path, **like),
    )
    result = CIFAR10(
        **QUICK, tune_epochs=1, calibration_steps=1, budget=0.8, latency=False, out=str(tmp_path)
    )
    names = ["dense", "pruned", "pruned, tuned", "sampled, calibrated", "sampled, distilled"]
    assert [step["name"] for step in result["steps"]] == names
    assert result["steps"][2]["checkpoint"] == "tuned/weights.safetensors"
    assert result["steps"][2]["macs_total"] == result["steps"][1]["macs_total"]
    pruned, tuned = (
        load_file(tmp_path / name) for name in ("pruned.safetensors", "tuned/weights.safetensors")
    )
    assert not torch.equal(pruned["linear.weight"], tuned["linear.weight"])
    printed = capsys.readouterr().out
    assert "| step | top-1 | MMACs | share of dense |\n| --- | ---: |" in printed
    assert teachers == [str(tmp_path / "dense.safetensors")] * 2  # of both trainings


@pytest.mark.usefixtures("narrow_resnet18")
def test_segmentation_goes_through_the_same_steps(tmp_path):
    # With so few channels interpolation would cost more than is saved.
    how = {"layout": "a", "interpolation": None, "grid_stride": None, "latency": False}
    result = CAMVID(**QUICK, **how, budget=0.9, out=str(tmp_path))
    assert [step["name"] for step in result["steps"]] == STEPS
    assert {step["metric"] for step in result["steps"]} == {"miou"}
    assert result["training"]["settled_share"] == pytest.approx(0.9, abs=0.03)
    assert result["share_of_dense"] == pytest.approx(0.45, abs=0.06)
    end = read_architecture(tmp_path / "weights.safetensors")
    assert end.widths == read_architecture(tmp_path / "pruned.safetensors").widths
    assert end.widths is not None and end.sampling is not None and end.sampling.layout == "a"
    # What was pruned starts a run of the ordinary recipe.
    camvid = load_recipe(RECIPES / "segmentation" / "camvid.py")
    again = camvid(
        **QUICK,
        size=(64, 96),
        fpn_channels=16,
        head_channels=16,
        init=str(tmp_path / "pruned.safetensors"),
        out=str(tmp_path / "again"),
    )
    assert again["architecture"]["widths"] == end.widths
    assert again["macs_total"] == result["steps"][1]["macs_total"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "relu_gate"}, r"method='relu_gate' with budget=0\.5; what was pruned"),
        ({"devices": 2}, "devices and num_nodes make 2 processes; one is required"),
        ({"sampling_weight": 0.1}, "both given"),
        ({"speedup": 100.0}, "speed-up up to that is required"),
        ({"tune_epochs": -1}, r"tune_epochs=-1; at least 0 is required"),
        ({"resume": True}, r"chain\.json' does not exist"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CIFAR10(**QUICK, **flags, out=str(tmp_path))


def test_data_and_weights_are_required():
    with pytest.raises(ValueError, match="no data folder was given; both are required"):
        CIFAR10()
    with pytest.raises(ValueError, match="no file of weights was given"):
        CIFAR10(data="somewhere")
    with pytest.raises(ValueError, match="no checkpoint was given; both are required"):
        CAMVID(data="somewhere")
    with pytest.raises(ValueError, match=r"num_images=0; at least 1 is required"):
        ChainSettings(num_images=0)
