"""The detection recipe from the command line: trained, evaluated, profiled, resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet as zoo

from sparsight.cli import load_recipe, main
from sparsight.compress import prune_filters
from sparsight.train.architecture import build_dense, pruned_architecture
from sparsight.train.checkpoint import load_checkpoint, read_architecture, save_checkpoint

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
RECIPE = str(Path(__file__).resolve().parents[1] / "recipes" / "detection" / "coco.py")
FLAGS = ["--quick", "--backbone", "resnet18", "--progress-bar", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    flags = [*FLAGS, "--deformable", "--budget", "0.6", "--out", str(out)]
    assert main(["train", RECIPE, *flags]) == 0
    return out


def test_training_leaves_weights_a_score_and_a_log(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["num_images"] == 4
    assert result["share"] == pytest.approx(0.6, abs=0.02)
    assert result["macs_total"] < result["detector_macs_total"]
    assert 0 <= result["metrics"]["ap"] <= 1
    assert result["architecture"]["model"] == "faster_rcnn"
    assert result["architecture"]["deformable"]
    log = (trained / "log" / "metrics.csv").read_text()
    for name in ("val_ap50", "loss_rpn_box_reg", "expected_share", "val_share"):
        assert name in log


def test_evaluating_counts_the_same_and_measures(trained, tmp_path, capsys):
    out = tmp_path / "scores.json"
    flags = ["--data", str(trained / "data"), "--seeds", "2", "--batch-size", "2"]
    weights = str(trained / "weights.safetensors")
    assert main(["evaluate", weights, *flags, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    before = json.loads((trained / "result.json").read_text())
    first, second = result["scores"]
    assert first["macs_total"] == before["macs_total"]
    assert first["macs_dense"] == before["macs_dense"] == second["macs_dense"]
    assert second["macs_total"] != first["macs_total"]
    assert result["published_gmacs"][0] == pytest.approx(before["published_gmacs"])
    assert (result["dataset"], result["metric"]) == ("coco", "ap")
    assert result["summary"]["share"]["std"] > 0
    assert [row["name"] for row in result["latency"]["rows"]] == [
        "dense, eager channels-last",
        "dense, frozen",
        "sampled, frozen",
    ]
    assert "AP50" in capsys.readouterr().out


def test_a_smaller_size_is_the_resized_baseline(trained, tmp_path):
    out = tmp_path / "scores.json"
    flags = ["--data", str(trained / "data"), "--size", "64x96", "--frozen", "false"]
    flags += ["--latency", "false", "--out", str(out)]
    assert main(["evaluate", str(trained / "weights.safetensors"), *flags]) == 0
    before = json.loads((trained / "result.json").read_text())
    score = json.loads(out.read_text())["scores"][0]
    assert score["macs_dense"] == before["macs_dense"] * (64 * 96) / (96 * 128)


def test_a_profile_names_the_layers(trained, capsys):
    assert main(["profile", str(trained / "weights.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "backbone.body.layer2.1" in printed
    assert "rpn.head" in printed


def test_masks_of_a_detector_are_drawn(trained, tmp_path):
    flags = [str(trained / "weights.safetensors"), "--data", str(trained / "data")]
    assert (
        main(["masks", *flags, "--images", "[1]", "--size", "64x96", "--out", str(tmp_path)]) == 0
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000000000107.png", "overview.png"]


def test_a_dense_run_starts_a_sampled_one_on_the_same_images(tmp_path):
    coco = load_recipe(Path(RECIPE))
    torch.save(zoo.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    common = {"backbone": "resnet18", "quick": True, "progress_bar": False}
    dense = coco(
        **common,
        pretrained=str(tmp_path / "resnet18.pth"),
        out=str(tmp_path / "a"),
        overfit_images=2,
    )
    assert dense["num_images"] == 2
    assert dense["share"] == 1.0
    assert dense["architecture"]["is_norm_frozen"]
    sampled = coco(
        **common,
        is_norm_frozen=True,
        init=str(tmp_path / "a" / "weights.safetensors"),
        sampling_weight=0.1,
        weights="published",
        interpolation="nearest",
        first_sampled_layer=2,
        out=str(tmp_path / "b"),
    )
    assert len(sampled["density"]) == 2 * 6
    assert not any("layer1" in name for name in sampled["density"])
    assert sampled["architecture"]["sampling"]["interpolation"] == "nearest"


def test_a_pruned_detector_starts_a_sampled_one_as_narrow_as_it_is(tmp_path, trained):
    torch.manual_seed(0)
    sampled = read_architecture(trained / "weights.safetensors")
    dense = replace(sampled, deformable=False, sampling=None)
    smaller = prune_filters(
        build_dense(dense).eval(),
        [torch.rand(3, 96, 128)],
        ratio=0.5,
        where=lambda name, _: name.startswith("backbone.body"),
    )
    save_checkpoint(tmp_path / "a.safetensors", smaller, pruned_architecture(dense, smaller))
    result = load_recipe(Path(RECIPE))(
        quick=True,
        backbone="resnet18",
        trainable_layers=sampled.trainable_layers,
        init=str(tmp_path / "a.safetensors"),
        sampling_weight=0.1,
        data=str(trained / "data"),
        out=str(tmp_path / "b"),
        progress_bar=False,
    )
    widths = read_architecture(tmp_path / "a.safetensors").widths
    assert result["architecture"]["widths"] == widths
    assert widths["backbone.body.layer1.0.conv1.weight"] == [4, 8, 3, 3]
    assert load_checkpoint(tmp_path / "b" / "weights.safetensors")[1].sampling is not None


def test_the_baselines_are_methods_of_the_recipe(tmp_path):
    coco = load_recipe(Path(RECIPE))
    common = {"backbone": "resnet18", "quick": True, "progress_bar": False, "overfit_images": 2}
    full = coco(**common, out=str(tmp_path / "full"))
    resized = coco(**common, method="resized", budget=0.5, out=str(tmp_path / "resized"))
    assert resized["architecture"]["size"] == (64, 96)
    assert 0.3 < resized["macs_total"] / full["macs_total"] < 0.7
    perforated = coco(**common, method="perforated", out=str(tmp_path / "perforated"))
    assert len(perforated["density"]) == 16
    assert 0.2 < sum(perforated["density"].values()) / 16 < 0.6
    pruned = coco(**common, method="sfp", filter_ratio=0.5, out=str(tmp_path / "pruned"))
    widths = pruned["architecture"]["widths"]
    assert widths["backbone.body.layer1.0.conv1.weight"] == [4, 8, 3, 3]
    assert all(name.startswith("backbone.body.layer") for name in widths)
    assert pruned["macs_total"] == pytest.approx(
        pruned["pruned_share"] * full["macs_total"], rel=0.1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "root='nowhere' has no annotations/instances_train2017.json"),
        ([], "no data folder was given; a folder with annotations/instances_train2017.json"),
        (["--quick", "--budget", "0"], "budget=0.0; a share of the dense model's MACs in (0, 1]"),
        (["--quick", "--init", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["--quick", "--pretrained", "gone.pth"], "'gone.pth' does not exist"),
        (
            ["--quick", "--pretrained", "a.pth", "--init", "b"],
            "pretrained='a.pth' and init='b' were both",
        ),
        (
            ["--quick", "--budget", "0.5", "--sampling-weight", "0.1"],
            "budget=0.5 and sampling_weight=0.1 were both given",
        ),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(arguments, message, capsys, tmp_path):
    assert main(["train", RECIPE, *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
